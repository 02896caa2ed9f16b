package dnsserver

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/internal/metrics"
)

// types are those that are counted by their names; others are counted together.
var types = [...]struct {
	typ  uint16
	name string
}{
	{0, "other"}, {typeA, "A"}, {typeAAAA, "AAAA"}, {typeSRV, "SRV"}, {typePTR, "PTR"}, {typeANY, "ANY"}, {typeNS, "NS"}, {typeSOA, "SOA"},
	{typeTXT, "TXT"}, {typeHTTPS, "HTTPS"},
}

// codes are those that are counted by their names; others, which only resolvers give, are counted together.
var codes = [...]struct {
	code rcode
	name string
}{
	{0xffff, "other"}, {noError, "NOERROR"}, {formErr, "FORMERR"}, {servFail, "SERVFAIL"}, {nxDomain, "NXDOMAIN"}, {notImp, "NOTIMP"},
	{refused, "REFUSED"}, {badVers, "BADVERS"},
}

var transports = [...]string{"udp", "tcp"}

// counts are what the server shows of itself.
type counts struct {
	answers [len(transports)][len(types)][len(codes)]atomic.Uint64

	dropped   atomic.Uint64 // messages that nobody is to answer
	unsent    atomic.Uint64 // answers that the kernel did not take
	accepted  atomic.Uint64 // connections
	turned    atomic.Uint64 // connections that were too many
	asked     atomic.Uint64 // questions to resolvers
	unheard   atomic.Uint64 // of which a resolver did not answer
	overflow  atomic.Uint64 // questions that were too many to ask a resolver
	underWay  atomic.Int64  // to resolvers
	connected atomic.Int64
}

// answer counts one.
func (c *counts) answer(stream bool, q *query, code rcode) {
	i, t, k := 0, 0, 0
	if stream {
		i = 1
	}
	if len(q.question) > 0 {
		for j := range types {
			if types[j].typ == q.typ {
				t = j
				break
			}
		}
	}
	for j := range codes {
		if codes[j].code == code {
			k = j
			break
		}
	}
	c.answers[i][t][k].Add(1)
}

const prefix = "silk_dns_"

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descAnswers     = desc("answers_total", "Answers given, by how they were asked for, the type asked for and the response code.", "transport", "type", "code")
	descDropped     = desc("dropped_total", "Messages that were no question, and were not answered.")
	descUnsent      = desc("unsent_total", "Answers by udp that the kernel did not take.")
	descConnections = desc("connections", "Connections that are open.")
	descAccepted    = desc("connections_total", "Connections accepted.")
	descTurned      = desc("connections_refused_total", "Connections closed at once because there were too many.")
	descForwarded   = desc("forwarded_total", "Questions sent to resolvers.")
	descUnheard     = desc("forward_failures_total", "Questions sent to resolvers that were not answered well.")
	descOverflow    = desc("forward_refused_total", "Questions failed because too many were under way to resolvers.")
	descUnderWay    = desc("forwards", "Questions of clients that wait for resolvers.")
)

// Describe implements prometheus.Collector.
func (s *Server) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descAnswers, descDropped, descUnsent, descConnections, descAccepted, descTurned, descForwarded, descUnheard, descOverflow, descUnderWay,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (s *Server) Collect(ch chan<- prometheus.Metric) {
	to, c := metrics.Scrape(ch), &s.counts
	for i := range c.answers {
		for t := range c.answers[i] {
			for k := range c.answers[i][t] {
				if n := c.answers[i][t][k].Load(); n > 0 {
					to.Counter(descAnswers, float64(n), transports[i], types[t].name, codes[k].name)
				}
			}
		}
	}
	to.Counter(descDropped, float64(c.dropped.Load()))
	to.Counter(descUnsent, float64(c.unsent.Load()))
	to.Gauge(descConnections, float64(c.connected.Load()))
	to.Counter(descAccepted, float64(c.accepted.Load()))
	to.Counter(descTurned, float64(c.turned.Load()))
	to.Counter(descForwarded, float64(c.asked.Load()))
	to.Counter(descUnheard, float64(c.unheard.Load()))
	to.Counter(descOverflow, float64(c.overflow.Load()))
	to.Gauge(descUnderWay, float64(c.underWay.Load()))
}
