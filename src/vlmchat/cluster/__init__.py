"""The worker on Ray Serve: the same app in each replica, one address before them. Needs ray."""
