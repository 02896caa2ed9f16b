package cni

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode"

	"code.cloudfoundry.org/silk/internal/plainjson"
)

// maxGroup bounds the name of a policy group in bytes.
const maxGroup = 255

// group returns the policy group of the container: policy_group_id of the metadata; or what the template policy_group
// makes of CNI_ARGS and the network configuration; or the network's name. In a template ${args.KEY} stands for an
// argument and ${config.KEY} for a text in the configuration. One that is missing is an error: a
// container must not get into a group by leaving something out.
func (c *call) group() (string, error) {
	var named string
	if !isNull(c.cfg.Metadata) {
		var err error
		if named, err = groupOf(c.cfg.Metadata); err != nil {
			return "", badGroup(fmt.Errorf("metadata.policy_group_id: expected a text: %w", err))
		}
	}
	group := c.cfg.Name
	switch {
	case named != "":
		group = named
	case c.cfg.PolicyGroup != "":
		var err error
		if group, err = c.expand("policy_group", c.cfg.PolicyGroup, nil); err != nil {
			return "", badGroup(err)
		}
	}
	if len(group) > maxGroup || group == "" || strings.ContainsFunc(group, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return "", badGroup(fmt.Errorf("%q: expected 1 to %d bytes of printable text", group, maxGroup))
	}
	return group, nil
}

func badGroup(err error) error {
	return &failure{code: codeConfig, msg: "invalid policy group", err: err}
}

// expand replaces the variables of a template, the value of key. judge may refuse what the runtime passed on; nil does not.
func (c *call) expand(key, template string, judge func(value string) error) (string, error) {
	var out strings.Builder
	var args map[string]string
	for rest := template; ; {
		before, after, found := strings.Cut(rest, "${")
		out.WriteString(before)
		if !found {
			return out.String(), nil
		}
		name, tail, closed := strings.Cut(after, "}")
		if !closed {
			return "", fmt.Errorf("%s %q: ${ without }", key, template)
		}
		rest = tail
		var value string
		if k, ok := strings.CutPrefix(name, "args."); ok {
			if args == nil {
				var err error
				if args, err = parseArgs(c.args); err != nil {
					return "", err
				}
			}
			value = args[k]
			if judge != nil {
				if err := judge(value); err != nil {
					return "", fmt.Errorf("%s %q: %s: %w", key, template, name, err)
				}
			}
		} else if k, ok := strings.CutPrefix(name, "config."); ok {
			var err error
			if value, err = c.member(k); err != nil {
				return "", err
			}
		} else {
			return "", fmt.Errorf("%s %q: unknown variable %q: expected args.KEY or config.KEY", key, template, name)
		}
		if value == "" {
			return "", fmt.Errorf("%s %q: %s is not there", key, template, name)
		}
		out.WriteString(value)
	}
}

// member returns a text in the configuration, "" when there is none of that name.
func (c *call) member(key string) (string, error) {
	var value string
	if plainjson.Each(c.input, func(name string, v []byte) bool {
		if name != key {
			return true
		}
		if isNull(v) {
			value = ""
			return true
		}
		var ok bool
		value, ok = plainjson.Text(v)
		return ok
	}) {
		return value, nil
	}
	var values map[string]json.RawMessage
	if err := json.Unmarshal(c.input, &values); err != nil {
		return "", err
	}
	value = ""
	json.Unmarshal(values[key], &value) // what is no text stays empty
	return value, nil
}
