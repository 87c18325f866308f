"""What RLEdit and MALMEN share: the hypernetwork, the editor that solves with it, and its training."""
