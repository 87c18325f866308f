"""The files of a session: records, journal, snapshots, and how a state is made of them again."""
