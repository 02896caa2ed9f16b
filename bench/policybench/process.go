package policybench

import (
	"context"
	"encoding/json"

	"code.cloudfoundry.org/silk/bench/server"
)

// process is a policy-server.
type process struct {
	*server.Process
	External, Internal string // addresses
}

// start runs a policy-server and waits until it serves.
func (s *setup) start(ctx context.Context) (*process, error) {
	cfg := map[string]any{
		"listen_host": "127.0.0.1", "listen_port": 0, "internal_listen_port": 0, "health_check_port": 0, "debug_server_port": 0, "enable_tls": true,
		"ca_cert_file": s.CA, "server_cert_file": s.Cert, "server_key_file": s.Key, "internal_clients": []string{"localhost"},
		"token_file": s.Tokens, "database": json.RawMessage(s.Database),
	}
	var p process
	var err error
	p.Process, err = server.Start(ctx, s.Bin, s.Dir, "-config-file", cfg, &p)
	return &p, err
}

// resident returns the resident memory in MiB.
func (p *process) resident() (float64, error) {
	kib, err := p.RSS()
	return kib / 1024, err
}
