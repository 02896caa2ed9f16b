package nft

import (
	"bytes"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// canonical returns a list of expressions in a form that does not depend on who encoded it: name by name, with attributes sorted and
// without those that are zero, which one side may leave out.
func canonical(list []byte) string {
	var b strings.Builder
	for _, item := range kernel.Attrs(list) {
		b.WriteString(expression(item) + ";")
	}
	return b.String()
}

func expression(item []byte) string {
	name, data := "", []byte(nil)
	for t, v := range kernel.Attrs(item) {
		switch t {
		case unix.NFTA_EXPR_NAME:
			name = kernel.Text(v)
		case unix.NFTA_EXPR_DATA:
			data = v
		}
	}
	return name + attributes(name, data, 0)
}

// nested says which attributes of an expression hold attributes: at each depth, by the expression's name.
var nested = map[string][]uint16{
	"cmp":       {unix.NFTA_CMP_DATA},
	"bitwise":   {unix.NFTA_BITWISE_MASK, unix.NFTA_BITWISE_XOR},
	"immediate": {unix.NFTA_IMMEDIATE_DATA},
}

func attributes(name string, data []byte, depth int) string {
	var out []string
	for t, v := range kernel.Attrs(data) {
		number := strconv.Itoa(int(t))
		switch {
		case depth == 0 && slices.Contains(nested[name], t), depth == 1 && name == "immediate" && t == unix.NFTA_DATA_VERDICT:
			out = append(out, number+"("+attributes(name, v, depth+1)+")")
		case name == "dynset" && depth == 0 && t == unix.NFTA_DYNSET_EXPR:
			out = append(out, number+"("+expression(v)+")")
		case name == "objref" && t == unix.NFTA_OBJREF_IMM_NAME: // the library sends it without the final zero
			out = append(out, number+"="+kernel.Text(v))
		case depth > 0 || len(bytes.Trim(v, "\x00")) > 0:
			out = append(out, number+"="+hex.EncodeToString(v))
		}
	}
	slices.Sort(out)
	return "[" + strings.Join(out, " ") + "]"
}
