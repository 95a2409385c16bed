"""Device code that more than one kernel family uses unchanged. Imported only when a kernel is compiled."""
