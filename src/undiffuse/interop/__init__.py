"""Other people's formats, one file each. They translate names and layouts; nothing is ever unpickled."""
