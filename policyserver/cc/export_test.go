package cc

// ParseGroups reads one group as a list of one.
func ParseGroups(raw []byte) (Groups, error) {
	var g Groups
	return g, g.add(raw, map[string]bool{})
}
