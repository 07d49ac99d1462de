"""`python -m vlmchat`: the same as the `vlmchat` command."""

from vlmchat.commands import main

if __name__ == "__main__":
    main()
