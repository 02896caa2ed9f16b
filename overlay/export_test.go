package overlay

// Rewrite reports whether the test run was asked to rewrite its golden files.
func Rewrite() bool { return *update }
