package cli_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSecurityGroupsAreMadeBoundAndRemoved(t *testing.T) {
	policyServer(t)
	if got := silk(t, 0, "asg", "list"); got != "NAME  GUID  RULES  RUNNING  STAGING  GROUPS  FROM\n" {
		t.Errorf("an empty list:\n%s", got)
	}
	wantText(t, silk(t, 0, "asg", "create", "public", "--allow", "tcp 10.0.0.0/8,10.1.0.1-10.1.0.9 443,8000-8100 log", "--allow", "icmp 0.0.0.0/0"),
		"public (", "\n  tcp 10.0.0.0/8,10.1.0.1-10.1.0.9 443,8000-8100 log\n  icmp 0.0.0.0/0\n")
	file := filepath.Join(t.TempDir(), "rules.json")
	if err := os.WriteFile(file, []byte(`[{"protocol":"udp","destination":"10.0.0.2","ports":"53","description":"dns\u001b[2J\u009b2J\u202e"}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	wantText(t, silk(t, 0, "asg", "create", "dns", "--rules", file), "udp 10.0.0.2 53  # dns [2J 2J")
	wantText(t, silk(t, 0, "asg", "bind", "dns", "--global", "--lifecycle", "both"), "for all containers: running\nfor all containers: staging\n")
	wantText(t, silk(t, 0, "asg", "bind", "public", "--space", "s1,s2", "--group", "web"), "for spaces: running: s1, s2\nfor policy group: web\n")
	list := silk(t, 0, "asg", "list")
	wantText(t, list, "public", "2 spaces  -        1 group", "all       all      -        silk")
	var out struct {
		Groups []struct {
			GUID, Name string
			Rules      []struct{ Protocol string }
			Spaces     []string `json:"running_spaces"`
		} `json:"security_groups"`
	}
	if err := json.Unmarshal([]byte(silk(t, 0, "asg", "list", "-o", "json")), &out); err != nil || len(out.Groups) != 2 || len(out.Groups[0].Rules) != 2 || len(out.Groups[0].Spaces) != 2 {
		t.Errorf("as json: %+v, %v", out, err)
	}
	got := silk(t, 0, "asg", "unbind", out.Groups[0].GUID, "--space", "s1", "--group", "web")
	if wantText(t, got, "for spaces: running: s2\n"); strings.Contains(got, "web") {
		t.Errorf("still bound:\n%s", got)
	}
	wantText(t, silk(t, 0, "asg", "update", "public", "--name", "private", "--allow", "all 10.0.0.1"), "private (", "\n  all 10.0.0.1\n")
	wantText(t, silk(t, 0, "asg", "show", "private"), "for spaces: running: s2")
	wantText(t, silk(t, 0, "asg", "delete", "private"), "deleted private (")
	if got := silk(t, 0, "asg", "list"); strings.Contains(got, "private") || !strings.Contains(got, "dns") {
		t.Errorf("after the removal:\n%s", got)
	}
}

func TestSecurityGroupErrorsSayWhatToDo(t *testing.T) {
	policyServer(t)
	silk(t, 0, "asg", "create", "a", "--allow", "all 10.0.0.1")
	for _, c := range []struct {
		args  []string
		parts []string
	}{
		{[]string{"create", "b"}, []string{"what does it allow?", "--allow"}},
		{[]string{"create", "a", "--allow", "all 10.0.0.1"}, []string{`name "a"`}},
		{[]string{"create", "b", "--allow", "tcp 10.0.0.1"}, []string{"ports are missing", "443"}},
		{[]string{"create", "b", "--allow", "tcp"}, []string{"PROTOCOL DESTINATIONS"}},
		{[]string{"create", "b", "--allow", "all 10.0.0.1/8"}, []string{"write 10.0.0.0/8"}},
		{[]string{"create", "b", "--rules", "/nowhere"}, []string{"--rules", "/nowhere"}},
		{[]string{"show", "nothing"}, []string{"silk asg list"}},
		{[]string{"delete", "nothing"}, []string{"silk asg list"}},
		{[]string{"update", "a"}, []string{"--rules, --allow or --name"}},
		{[]string{"bind", "a"}, []string{"--global, --space or --group"}},
		{[]string{"bind", "a", "--global", "--lifecycle", "always"}, []string{"running, staging or both"}},
		{[]string{"bind", "a", "--space", "a\x01b"}, []string{"space", "printable"}},
		{[]string{"list", "--token", "wrong"}, []string{"--token"}},
		{[]string{"list", "--token", "little"}, []string{"somebody who may"}},
		{[]string{"list", "-o", "yaml"}, []string{"table or json"}},
		{[]string{"list", "--server", "https://127.0.0.1:1"}, []string{"does not answer"}},
	} {
		wantText(t, silk(t, 1, append([]string{"asg"}, c.args...)...), c.parts...)
	}
	s := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(s.Close)
	wantText(t, silk(t, 1, "asg", "list", "--server", s.URL), "earlier kind")
}
