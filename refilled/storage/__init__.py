"""Files that a kill leaves whole, the folder of one run, and their copy in an object store."""
