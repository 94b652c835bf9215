"""Its folder comes first on sys.path, so that tests can import `tiny_models`."""
