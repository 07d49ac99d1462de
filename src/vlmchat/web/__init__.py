"""The web page: a chat about pictures in the browser."""
