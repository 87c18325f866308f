"""What several test files share: tiny models and streams, references to compare with, and ways to break things.

Nothing here is a test. A helper that one file needs stays in that file.
"""
