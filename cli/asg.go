package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/secgroup"
	"github.com/spf13/cobra"
)

func asgCommand() *cobra.Command {
	f := &policyFlags{}
	c := &cobra.Command{
		Use: "asg", Short: "Say what containers may reach outside the network",
		Long: "A security group is a list of rules that allow; what no rule of a container's groups allows is denied. A group holds for those it is bound to:\n" +
			"all containers, those of a space, or those of a policy group (an app). Groups that follow Cloud Controller are changed there, with cf.\n" +
			"Which policy-server is asked, and as whom, is told as for silk policy; it takes an admin.",
	}
	f.add(c)
	c.AddCommand(asgList(f), asgShow(f), asgCreate(f), asgUpdate(f), asgDelete(f), asgBind(f, "bind", "Have a group hold for more containers"), asgBind(f, "unbind", "Have a group hold for fewer containers"))
	return c
}

// asgWords is the form of a group in JSON.
type asgWords struct {
	GUID            string           `json:"guid"`
	Name            string           `json:"name"`
	Rules           []secgroup.Rule  `json:"rules"`
	Problems        []string         `json:"problems,omitempty"` // with rules that are left out
	StagingDefault  bool             `json:"staging_default"`
	RunningDefault  bool             `json:"running_default"`
	StagingSpaces   []string         `json:"staging_spaces,omitempty"`
	RunningSpaces   []string         `json:"running_spaces,omitempty"`
	Members         []identity.Group `json:"policy_groups,omitempty"`
	CloudController bool             `json:"cloud_controller"`
}

func asgOf(k secgroup.Kept) asgWords {
	g, problems := k.Group()
	w := asgWords{g.GUID, g.Name, append([]secgroup.Rule{}, g.Rules...), nil, g.StagingDefault, g.RunningDefault, g.StagingSpaces, g.RunningSpaces, g.Members, k.CloudController}
	for _, p := range problems {
		w.Problems = append(w.Problems, p.String())
	}
	return w
}

// asgRun wraps what a command does with a client and the form of its output.
func asgRun(f *policyFlags, form *string, do func(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, args []string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		if err := checkForm(*form); err != nil {
			return err
		}
		client, err := f.client()
		if err != nil {
			return err
		}
		defer client.Close()
		return do(c.Context(), client.SecurityGroups(), c.OutOrStdout(), args)
	}
}

func addForm(c *cobra.Command, form *string) {
	c.Flags().StringVarP(form, "output", "o", tables, "table or json")
}

func asgList(f *policyFlags) *cobra.Command {
	var form string
	c := &cobra.Command{Use: "list", Short: "List security groups", Args: cobra.NoArgs}
	addForm(c, &form)
	c.RunE = asgRun(f, &form, func(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, _ []string) error {
		list, err := g.List(ctx)
		if err != nil {
			return f.adviseASG(err)
		}
		words := make([]asgWords, len(list))
		for i, k := range list {
			words[i] = asgOf(k)
		}
		if form == jsonForm {
			return writeJSON(out, map[string]any{"security_groups": words})
		}
		t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NAME\tGUID\tRULES\tRUNNING\tSTAGING\tGROUPS\tFROM")
		for _, w := range words {
			from := "silk"
			if w.CloudController {
				from = "cloud controller"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", w.Name, w.GUID, w.count(), whose(w.RunningDefault, w.RunningSpaces), whose(w.StagingDefault, w.StagingSpaces), some(len(w.Members), "group"), from)
		}
		return t.Flush()
	})
	return c
}

func (w asgWords) count() string {
	if len(w.Problems) > 0 {
		return fmt.Sprintf("%d, %d left out", len(w.Rules), len(w.Problems))
	}
	return fmt.Sprint(len(w.Rules))
}

func whose(all bool, spaces []string) string {
	if all {
		return "all"
	}
	return some(len(spaces), "space")
}

func some(n int, what string) string {
	switch n {
	case 0:
		return "-"
	case 1:
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func asgShow(f *policyFlags) *cobra.Command {
	var form string
	c := &cobra.Command{Use: "show NAME|GUID", Short: "Show a security group with its rules", Args: cobra.ExactArgs(1)}
	addForm(c, &form)
	c.RunE = asgRun(f, &form, func(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, args []string) error {
		k, err := f.findASG(ctx, g, args[0])
		if err != nil {
			return err
		}
		return tellASG(out, form, k)
	})
	return c
}

// findASG returns the group that a name or a GUID means.
func (f *policyFlags) findASG(ctx context.Context, g *policyhttp.SecurityGroups, word string) (secgroup.Kept, error) {
	list, err := g.List(ctx)
	if err != nil {
		return secgroup.Kept{}, f.adviseASG(err)
	}
	var found []secgroup.Kept
	for _, k := range list {
		if k.GUID == word {
			return k, nil
		}
		if k.Name == word {
			found = append(found, k)
		}
	}
	switch len(found) {
	case 0:
		return secgroup.Kept{}, fault.NotFoundf("no security group %q: silk asg list shows those that there are", word)
	case 1:
		return found[0], nil
	}
	var guids []string
	for _, k := range found {
		guids = append(guids, k.GUID)
	}
	return secgroup.Kept{}, fault.Conflictf("%d security groups are called %q: give the GUID of the one that you mean: %s", len(found), word, strings.Join(guids, ", "))
}

func tellASG(out io.Writer, form string, k secgroup.Kept) error {
	w := asgOf(k)
	if form == jsonForm {
		return writeJSON(out, w)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s (%s)\n", w.Name, w.GUID)
	if w.CloudController {
		b.WriteString("follows Cloud Controller\n")
	}
	for _, l := range []struct {
		what string
		all  bool
		list []string
	}{{"running", w.RunningDefault, w.RunningSpaces}, {"staging", w.StagingDefault, w.StagingSpaces}} {
		switch {
		case l.all:
			fmt.Fprintf(&b, "for all containers: %s\n", l.what)
		case len(l.list) > 0:
			fmt.Fprintf(&b, "for spaces: %s: %s\n", l.what, strings.Join(l.list, ", "))
		}
	}
	for _, m := range w.Members {
		fmt.Fprintf(&b, "for policy group: %s\n", m)
	}
	for _, r := range w.Rules {
		fmt.Fprintf(&b, "  %v", r)
		if r.Description != "" {
			fmt.Fprintf(&b, "  # %s", strings.Map(oneLine, r.Description))
		}
		b.WriteByte('\n')
	}
	for _, p := range w.Problems {
		fmt.Fprintf(&b, "  left out: %s\n", strings.Map(oneLine, fmt.Sprint(p)))
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// oneLine keeps what others wrote from moving the cursor.
func oneLine(r rune) rune {
	if !strconv.IsPrint(r) { // also those of C1, and what turns the direction of writing
		return ' '
	}
	return r
}

// asgRules are the flags that say what a group allows.
type asgRules struct {
	file  string
	allow []string
}

func (r *asgRules) add(c *cobra.Command) {
	c.Flags().StringVar(&r.file, "rules", "", "file with a JSON array of rules, as cf create-security-group takes it or in Silk's form; - for standard input")
	c.Flags().StringArrayVar(&r.allow, "allow", nil, `a rule such as "tcp 10.0.0.0/8,10.1.0.1-10.1.0.9 443,8000-8100 log", "icmp 10.0.0.0/8" or "all 0.0.0.0/0"; may be given several times`)
}

// text returns the rules in the form of Cloud Controller; ok is false when there are no flags.
func (r *asgRules) text(in io.Reader) (text string, ok bool, err error) {
	var rules []secgroup.Rule
	switch {
	case r.file == "" && r.allow == nil:
		return "", false, nil
	case r.file != "":
		b, err := readRules(r.file, in)
		if err != nil {
			return "", false, fmt.Errorf("--rules: %w", err)
		}
		form := secgroup.Own
		var keys []map[string]json.RawMessage
		if json.Unmarshal(b, &keys) == nil && len(keys) > 0 && keys[0]["destination"] != nil {
			form = secgroup.CloudController
		}
		if rules, err = form.Parse(b); err != nil {
			return "", false, fmt.Errorf("--rules: %w", err)
		}
	}
	for _, s := range r.allow {
		rule, err := ruleOf(s)
		if err != nil {
			return "", false, fmt.Errorf("--allow %q: %w", s, err)
		}
		rules = append(rules, rule)
	}
	return secgroup.Format(rules), true, nil
}

func readRules(file string, in io.Reader) ([]byte, error) {
	if file == "-" {
		return io.ReadAll(io.LimitReader(in, 16<<20))
	}
	return os.ReadFile(file)
}

// ruleOf reads a rule in a line: protocol, destinations, ports where there are any, "log".
func ruleOf(line string) (secgroup.Rule, error) {
	words := strings.Fields(line)
	logged := len(words) > 0 && words[len(words)-1] == "log"
	if logged {
		words = words[:len(words)-1]
	}
	if len(words) < 2 || len(words) > 3 {
		return secgroup.Rule{}, fault.Invalidf(`expected "PROTOCOL DESTINATIONS [PORTS] [log]", such as "tcp 10.0.0.0/8 443"`)
	}
	own := map[string]any{"protocol": words[0], "destinations": strings.Split(words[1], ","), "log": logged}
	if len(words) == 3 {
		own["ports"] = strings.Split(words[2], ",")
	}
	b, err := json.Marshal([]any{own})
	if err != nil {
		return secgroup.Rule{}, err
	}
	rules, err := secgroup.Own.Parse(b)
	if err != nil {
		return secgroup.Rule{}, err
	}
	return rules[0], nil
}

func asgCreate(f *policyFlags) *cobra.Command {
	var form string
	var rules asgRules
	c := &cobra.Command{Use: "create NAME", Short: "Make a security group, which holds for nobody until it is bound", Args: cobra.ExactArgs(1)}
	addForm(c, &form)
	rules.add(c)
	c.RunE = asgRun(f, &form, func(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, args []string) error {
		text, ok, err := rules.text(c.InOrStdin())
		if err == nil && !ok {
			err = fault.Invalidf(`what does it allow? Give --rules FILE, or --allow "tcp 10.0.0.0/8 443" once or several times`)
		}
		if err != nil {
			return err
		}
		k, err := g.Create(ctx, secgroup.Record{Name: args[0], Rules: text})
		if err != nil {
			return f.adviseASG(err)
		}
		return tellASG(out, form, k)
	})
	return c
}

func asgUpdate(f *policyFlags) *cobra.Command {
	var form, name string
	var rules asgRules
	c := &cobra.Command{Use: "update NAME|GUID", Short: "Replace the rules of a security group, or its name", Args: cobra.ExactArgs(1)}
	addForm(c, &form)
	rules.add(c)
	c.Flags().StringVar(&name, "name", "", "its new name")
	c.RunE = asgRun(f, &form, func(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, args []string) error {
		text, ok, err := rules.text(c.InOrStdin())
		if err == nil && !ok && name == "" {
			err = fault.Invalidf("what is to be different? Give --rules, --allow or --name")
		}
		if err != nil {
			return err
		}
		var change secgroup.Change
		if ok {
			change.Rules = &text
		}
		if name != "" {
			change.Name = &name
		}
		return f.changeASG(ctx, g, out, form, args[0], change)
	})
	return c
}

func (f *policyFlags) changeASG(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, form, word string, change secgroup.Change) error {
	k, err := f.findASG(ctx, g, word)
	if err != nil {
		return err
	}
	if k, err = g.Change(ctx, k.GUID, change); err != nil {
		return f.adviseASG(err)
	}
	return tellASG(out, form, k)
}

func asgDelete(f *policyFlags) *cobra.Command {
	var form string
	c := &cobra.Command{Use: "delete NAME|GUID", Short: "Remove a security group: its containers can no longer reach what only it allows", Args: cobra.ExactArgs(1)}
	addForm(c, &form)
	c.RunE = asgRun(f, &form, func(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, args []string) error {
		k, err := f.findASG(ctx, g, args[0])
		if err != nil {
			return err
		}
		if err := g.Delete(ctx, k.GUID); err != nil {
			return f.adviseASG(err)
		}
		if form == jsonForm {
			return writeJSON(out, map[string]string{"deleted": k.GUID})
		}
		_, err = fmt.Fprintf(out, "deleted %s (%s)\n", k.Name, k.GUID)
		return err
	})
	return c
}

func asgBind(f *policyFlags, use, short string) *cobra.Command {
	var form, lifecycle string
	var global bool
	var spaces, groups []string
	c := &cobra.Command{Use: use + " NAME|GUID", Short: short, Args: cobra.ExactArgs(1)}
	addForm(c, &form)
	c.Flags().BoolVar(&global, "global", false, "all containers")
	c.Flags().StringSliceVar(&spaces, "space", nil, "containers of the space with this GUID; may be given several times")
	c.Flags().StringSliceVar(&groups, "group", nil, "containers of this policy group (of an app: its name or GUID), whatever they do; may be given several times")
	c.Flags().StringVar(&lifecycle, "lifecycle", "running", "with --global and --space: running, staging or both")
	c.RunE = asgRun(f, &form, func(ctx context.Context, g *policyhttp.SecurityGroups, out io.Writer, args []string) error {
		if !global && spaces == nil && groups == nil {
			return fault.Invalidf("whose containers? Give --global, --space or --group")
		}
		phases := map[string][]string{"running": {"running"}, "staging": {"staging"}, "both": {"running", "staging"}}[lifecycle]
		if phases == nil {
			return fault.Invalidf("--lifecycle %q: expected running, staging or both", lifecycle)
		}
		var scope secgroup.Scope
		if slices.Contains(phases, "running") {
			scope.RunningDefault, scope.RunningSpaces = global, spaces
		}
		if slices.Contains(phases, "staging") {
			scope.StagingDefault, scope.StagingSpaces = global, spaces
		}
		var err error
		if scope.Members, err = f.resolve(ctx, groups); err != nil {
			return err
		}
		change := secgroup.Change{Bind: scope}
		if use == "unbind" {
			change = secgroup.Change{Unbind: scope}
		}
		return f.changeASG(ctx, g, out, form, args[0], change)
	})
	return c
}

// adviseASG adds to an error what its reader can do.
func (f *policyFlags) adviseASG(err error) error {
	if se, ok := errors.AsType[*httpjson.StatusError](err); ok && se.Status == 404 && strings.Contains(se.Text, "page not found") {
		return fmt.Errorf("%w\n%s is of an earlier kind and knows no security groups of its own, or no policy-server's external API", err, f.server)
	}
	switch fault.Of(err) {
	case fault.Denied, fault.Unavailable:
		return f.advise(err)
	}
	return err
}
