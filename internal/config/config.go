// Package config reads the JSON configuration file of a program.
//
// Reading is strict: an unknown key is an error that names the nearest known one, and every problem is reported at once
// with its path. Keys that existing deployments render and that mean nothing here are listed by the program and
// ignored with a warning.
//
// Use: fill a struct with defaults, Load it, log the warnings.
package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
)

// Validator is a configuration that can judge itself.
type Validator interface {
	// Validate adds every problem it finds to p.
	Validate(p *Problems)
}

// Problems collects what is wrong with a configuration.
type Problems struct{ list []error }

// Addf records a problem with the key at path ("database.port").
func (p *Problems) Addf(path, format string, args ...any) {
	p.list = append(p.list, fmt.Errorf("%s: %s", path, fmt.Sprintf(format, args...)))
}

// Require records path as missing when ok is false.
func (p *Problems) Require(path string, ok bool, expected string) {
	if !ok {
		p.Addf(path, "missing: expected %s", expected)
	}
}

// Check records err, if there is one, as a problem with the key at path.
func (p *Problems) Check(path string, err error) {
	if err != nil {
		p.Addf(path, "%v", err)
	}
}

// Err returns all problems as one fault.Invalid, nil if there are none.
func (p *Problems) Err() error { return fault.New(fault.Invalid, errors.Join(p.list...)) }

// Load reads the file at path into the struct that into points to, which holds the defaults. It returns a warning for
// each key of ignored that the file has ("a.b" for nested ones). Keys match in any case, as encoding/json does. A
// file that cannot be read keeps its cause; everything else wrong is fault.Invalid.
func Load(path string, into any, ignored ...string) (warnings []string, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	warnings, err = Parse(b, into, ignored...)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", path, err)
	}
	return warnings, nil
}

// Parse is Load for text at hand.
func Parse(b []byte, into any, ignored ...string) (warnings []string, err error) {
	var tree map[string]json.RawMessage
	if err := json.Unmarshal(b, &tree); err != nil {
		return nil, fault.New(fault.Invalid, fmt.Errorf("not a JSON object: %w", err))
	}
	var p Problems
	check(&p, &warnings, "", tree, reflect.TypeOf(into).Elem(), ignored)
	if err := json.Unmarshal(b, into); err != nil {
		var te *json.UnmarshalTypeError
		if errors.As(err, &te) {
			p.Addf(te.Field, "is a JSON %s: expected %v", te.Value, te.Type)
		} else {
			p.list = append(p.list, err)
		}
		return nil, p.Err()
	}
	if v, ok := into.(Validator); ok {
		v.Validate(&p)
	}
	slices.Sort(warnings)
	return warnings, p.Err()
}

// Unknown returns the paths of the keys in tree that the struct into points to has not, for files that other programs' deployments render: as
// ignored keys of Parse they are warnings.
func Unknown(tree map[string]json.RawMessage, into any) []string {
	return unknown(nil, "", tree, reflect.TypeOf(into).Elem())
}

func unknown(paths []string, prefix string, tree map[string]json.RawMessage, t reflect.Type) []string {
	fields := fieldsOf(t)
	for k, v := range tree {
		ft, ok := fields[strings.ToLower(k)]
		if !ok {
			paths = append(paths, prefix+k)
			continue
		}
		if sub, inner, ok := within(v, ft); ok {
			paths = unknown(paths, prefix+k+".", sub, inner)
		}
	}
	return paths
}

// within returns the keys of a value whose field is a struct.
func within(v json.RawMessage, ft reflect.Type) (sub map[string]json.RawMessage, inner reflect.Type, ok bool) {
	for ft.Kind() == reflect.Pointer {
		ft = ft.Elem()
	}
	return sub, ft, ft.Kind() == reflect.Struct && !implementsUnmarshaler(ft) && json.Unmarshal(v, &sub) == nil
}

// check compares the keys of tree with the fields of t.
func check(p *Problems, warnings *[]string, prefix string, tree map[string]json.RawMessage, t reflect.Type, ignored []string) {
	fields := fieldsOf(t)
	keys := make([]string, 0, len(tree))
	for k := range tree {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		path := prefix + k
		if slices.ContainsFunc(ignored, func(i string) bool { return strings.EqualFold(i, path) }) {
			*warnings = append(*warnings, fmt.Sprintf("key %q means nothing here and is ignored", path))
			continue
		}
		ft, ok := fields[strings.ToLower(k)]
		if !ok {
			msg := "unknown key"
			if n := nearest(strings.ToLower(k), fields); n != "" {
				msg += fmt.Sprintf(": did you mean %q?", prefix+n)
			}
			p.Addf(path, "%s", msg)
			continue
		}
		if sub, inner, ok := within(tree[k], ft); ok {
			check(p, warnings, path+".", sub, inner, ignored)
		}
	}
}

func implementsUnmarshaler(t reflect.Type) bool {
	p := reflect.PointerTo(t)
	return p.Implements(reflect.TypeFor[json.Unmarshaler]()) || p.Implements(reflect.TypeFor[interface{ UnmarshalText([]byte) error }]())
}

// fieldsOf maps the lower-case keys of a struct to the types of their fields.
func fieldsOf(t reflect.Type) map[string]reflect.Type {
	m := map[string]reflect.Type{}
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || !f.IsExported() || f.Anonymous && name == "" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		m[strings.ToLower(name)] = f.Type
	}
	return m
}

// nearest returns the known key with the fewest edits to k, "" when none is within a third of its length.
func nearest(k string, fields map[string]reflect.Type) string {
	best, least := "", max(2, len(k)/3)+1
	for f := range fields {
		if d := distance(k, f); d < least || d == least && best != "" && f < best {
			best, least = f, d
		}
	}
	return best
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range a {
		diagonal := row[0]
		row[0] = i + 1
		for j := range b {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
