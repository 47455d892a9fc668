"""Times of strategies: how they are taken, and where they are kept."""
