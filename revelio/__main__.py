"""``python -m revelio <command>``, which launchers of several processes can start."""

from revelio.cli import main

if __name__ == "__main__":
    main()
