package testkit

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// Example is a request and its answer as a document of an API shows them, in a block marked http:
//
//	PUT /leases/renew
//	{"underlay_ip": "10.0.16.5"}
//
//	200
//	{}
//
// Either body may be missing.
type Example struct {
	Line         string // the request's first line
	Method, Path string
	Body         string
	Answer       string // the status, and below it the body
}

var exampleBlock = regexp.MustCompile("(?s)```http\n(.*?)\n?```")

// Examples returns the examples of a text, at least so many: a document that shows fewer fails the test.
func Examples(t testing.TB, text string, least int) []Example {
	t.Helper()
	var all []Example
	for _, m := range exampleBlock.FindAllStringSubmatch(text, -1) {
		request, answer, _ := strings.Cut(m[1], "\n\n")
		var e Example
		e.Line, e.Body, _ = strings.Cut(request, "\n")
		e.Method, e.Path, _ = strings.Cut(e.Line, " ")
		e.Answer = strings.TrimSpace(answer)
		all = append(all, e)
	}
	if len(all) < least {
		t.Fatalf("found %d examples in the document: expected at least %d", len(all), least)
	}
	return all
}

// ReadExamples is Examples of a file.
func ReadExamples(t testing.TB, path string, least int) []Example {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return Examples(t, string(b), least)
}
