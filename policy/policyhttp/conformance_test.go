package policyhttp_test

import (
	"context"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policytest"
)

func admin(context.Context) (string, error) { return "admin", nil }

// open returns a client of a new store, over HTTP.
func open(t testing.TB, maxTag identity.Tag) *policyhttp.Client {
	s := serve(t, backendOf(openStore(t, maxTag)), externalOptions(), policyhttp.InternalOptions{})
	return client(t, s.URL)
}

func client(t testing.TB, urls ...string) *policyhttp.Client {
	c := policyhttp.NewClient(urls, nil, policyhttp.ClientOptions{Timeout: 10 * time.Second, Wait: 20 * time.Second, Token: admin})
	t.Cleanup(c.Close)
	return c
}

// TestConformance runs the suites of every Book and every Feed over the whole way: client, HTTP, handlers, store.
func TestConformance(t *testing.T) {
	t.Run("book", func(t *testing.T) {
		policytest.Run(t, func(t testing.TB, maxTag identity.Tag) policy.Book { return open(t, maxTag) })
	})
	t.Run("feed", func(t *testing.T) {
		policytest.RunFeed(t, func(t testing.TB, maxTag identity.Tag) policytest.Subject {
			c := open(t, maxTag)
			return policytest.Subject{Feed: c, Book: c}
		})
	})
	t.Run("groups", func(t *testing.T) {
		policytest.RunSecurityGroups(t, func(t testing.TB) policytest.GroupsSubject {
			g := open(t, 0).SecurityGroups()
			return policytest.GroupsSubject{Book: g, Feed: g}
		})
	})
}
