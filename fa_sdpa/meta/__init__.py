"""Everything that can be said about an attention call without running it. Imports torch only."""
