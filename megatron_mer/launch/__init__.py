"""Starting a run: ranks under every launcher."""
