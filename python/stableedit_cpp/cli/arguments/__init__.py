"""What each command takes: its parser. No torch is loaded here, so that ``--help`` answers at once."""
