package cli

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"github.com/spf13/cobra"
)

// policyFlags say which policy-server a command means, and as whom it speaks.
type policyFlags struct {
	server, token, ca, cert, key string

	api *httpjson.Client // the server's, or Cloud Controller's beside it
}

func (f *policyFlags) add(c *cobra.Command) {
	for _, v := range f.values() {
		c.PersistentFlags().StringVar(v.to, v.name, "", v.text+" ["+v.env+"]")
	}
}

// value is a flag, and the variable of the environment that counts without it.
type value struct {
	to              *string
	name, env, text string
}

func (f *policyFlags) values() []value {
	return []value{
		{&f.server, "server", "SILK_POLICY_SERVER", "policy-server, such as https://policy-server:4002, or in Cloud Foundry the API, such as https://api.example.com"},
		{&f.token, "token", "SILK_POLICY_TOKEN", "bearer token, or @FILE with it (in Cloud Foundry \"$(cf oauth-token)\")"},
		{&f.ca, "ca", "SILK_POLICY_CA", "CA certificate of the server in PEM form (default the system's)"},
		{&f.cert, "cert", "SILK_POLICY_CERT", "client certificate, instead of a token or beside it"},
		{&f.key, "key", "SILK_POLICY_KEY", "its key"},
	}
}

// callTime bounds one call.
const callTime = 10 * time.Second

// client returns a client of the server.
func (f *policyFlags) client() (*policyhttp.Client, error) {
	for _, v := range f.values() {
		*v.to = cmp.Or(*v.to, os.Getenv(v.env))
	}
	u, err := url.Parse(f.server)
	switch {
	case f.server == "":
		return nil, fault.Invalidf("which policy-server? Give --server or set SILK_POLICY_SERVER; in a lab: silk lab exec policy-server -- silk policy ...")
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "":
		return nil, fault.Invalidf("--server %q: expected a URL such as https://policy-server:4002", f.server)
	}
	f.server = strings.TrimSuffix(f.server, "/")
	token, err := f.bearer()
	if err != nil {
		return nil, err
	}
	if token == "" && f.cert == "" {
		return nil, fault.Invalidf("who are you? Give --token or --cert and --key, or set SILK_POLICY_TOKEN")
	}
	tc, err := f.tls()
	if err != nil {
		return nil, err
	}
	o := policyhttp.ClientOptions{Timeout: callTime, Traceparent: os.Getenv("TRACEPARENT")}
	if token != "" {
		o.Token = func(context.Context) (string, error) { return token, nil }
	}
	f.api = &httpjson.Client{Base: f.server, Limit: 1 << 20, HTTP: &http.Client{
		Timeout: callTime, Transport: bearer{token, &http.Transport{TLSClientConfig: tc, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true}},
	}}
	return policyhttp.NewClient([]string{f.server}, tc, o), nil
}

// bearer returns the token without the word before it.
func (f *policyFlags) bearer() (string, error) {
	token := f.token
	if path, ok := strings.CutPrefix(token, "@"); ok {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", fmt.Errorf("--token: %w", err)
		}
		token = string(b)
	}
	token = strings.TrimSpace(token)
	if word, rest, ok := strings.Cut(token, " "); ok && strings.EqualFold(word, "bearer") {
		token = strings.TrimSpace(rest)
	}
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return "", fault.Invalidf("--token: it has characters that no token has: is it @FILE with the token in it that you mean?")
	}
	return token, nil
}

// tls returns how connections are secured: by the system's authorities and without a client certificate unless told otherwise.
func (f *policyFlags) tls() (*tls.Config, error) {
	tc := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		b, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("--ca: %w", err)
		}
		tc.RootCAs = x509.NewCertPool()
		if !tc.RootCAs.AppendCertsFromPEM(b) {
			return nil, fault.Invalidf("--ca: %s holds no certificate in PEM form", f.ca)
		}
	}
	if (f.cert == "") != (f.key == "") {
		return nil, fault.Invalidf("--cert and --key go together: one of them is missing")
	}
	if f.cert != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, fmt.Errorf("--cert, --key: %w", err)
		}
		tc.Certificates = []tls.Certificate{pair}
	}
	return tc, nil
}

// bearer adds a token to requests.
type bearer struct {
	token string
	next  http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if b.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "bearer "+b.token)
	}
	return b.next.RoundTrip(r)
}

// guid is the form of what Cloud Controller calls an app by.
var guid = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// resolve returns the groups that names stand for: GUIDs of apps if Cloud Controller is behind the server and knows them, else the names themselves.
func (f *policyFlags) resolve(ctx context.Context, names []string) ([]identity.Group, error) {
	out := make([]identity.Group, len(names))
	for i, n := range names {
		out[i] = identity.Group(n)
		if err := out[i].Validate(); err != nil {
			return nil, err
		}
		if guid.MatchString(n) {
			continue
		}
		var apps struct {
			Resources []struct {
				GUID string `json:"guid"`
				Name string `json:"name"`
			} `json:"resources"`
			Pagination *struct {
				Total int `json:"total_results"`
			} `json:"pagination"`
		}
		err := f.api.Do(ctx, http.MethodGet, "/v3/apps?names="+url.QueryEscape(n), nil, &apps)
		switch {
		case failed(err): // the name itself would make a policy that allows nothing
			return nil, fmt.Errorf("look for the app %q: %w", n, f.advise(err))
		case err != nil || apps.Pagination == nil:
			continue // there is no Cloud Controller: names are as the containers' runtime gave them
		case len(apps.Resources) == 0:
			return nil, fault.NotFoundf("no app %q that you can see: check the name, or give its GUID", n)
		case len(apps.Resources) > 1:
			var guids []string
			for _, a := range apps.Resources {
				guids = append(guids, a.GUID)
			}
			return nil, fault.Conflictf("%d apps are called %q: give the GUID of the one that you mean: %s", apps.Pagination.Total, n, strings.Join(guids, ", "))
		}
		out[i] = identity.Group(apps.Resources[0].GUID)
	}
	return out, nil
}

// failed reports whether an error is of a Cloud Controller that is there, or perhaps: a server without it does not have the path.
func failed(err error) bool {
	if se, ok := errors.AsType[*httpjson.StatusError](err); ok {
		return se.Status != http.StatusNotFound && se.Status != http.StatusMethodNotAllowed
	}
	return errors.Is(err, fault.Unavailable)
}

// advise adds to an error what its reader can do.
func (f *policyFlags) advise(err error) error {
	hint := ""
	switch fault.Of(err) {
	case fault.Denied:
		hint = "the server does not accept the token or certificate, or it may not do this: give --token, or --cert and --key, of somebody who may"
	case fault.Unavailable:
		hint = "the policy-server at " + f.server + " does not answer now: check --server and --ca, or try again"
	case fault.Exhausted:
		hint = "remove policies that nobody needs, or ask an operator to raise max_policies or max_tag"
	case fault.NotFound:
		if _, ok := errors.AsType[*httpjson.StatusError](err); !ok {
			return err // a server of an earlier kind, which has made the change but does not wait
		}
		hint = "is " + f.server + " a policy-server's external API?"
	}
	if hint == "" {
		return err
	}
	return fmt.Errorf("%w\n%s", err, hint)
}
