package tlsproxy

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/endpoint"
)

// maxFile bounds a file with certificates or a key, in bytes.
const maxFile = 1 << 20

// unsettled is how long after a file's last change it may change once more without showing it: times of files are not exact.
const unsettled = 2 * time.Second

// directory has certificates that the platform puts into files, one directory for each container or group. They are looked at whenever a handshake
// begins.
type directory struct {
	base, below string // the directory that is the operator's, and below it the template
	cert, key   string // names of files
	clients     trusted
	domain      authority.TrustDomain // of clients
	log         *slog.Logger

	mu    sync.Mutex
	pairs map[endpoint.Key]*pair
}

// pair is a certificate and its key in two files.
type pair struct {
	mu      sync.Mutex
	good    *credential // the last that could be used
	failure error       // of the last attempt; good is still used
	told    string
	files   stamps // the files at the last attempt
	read    time.Time
}

// stamps tell whether two files have changed.
type stamps [2]stamp

type stamp struct {
	dev, ino   uint64
	size       int64
	mod, inode time.Time // of the last changes of content and of anything
}

// settled reports whether files with these stamps, read at a time, would have other stamps if they had changed since.
func (s stamps) settled(read time.Time) bool {
	for _, f := range s {
		if read.Sub(f.mod) < unsettled || read.Sub(f.inode) < unsettled {
			return false
		}
	}
	return true
}

func stampOf(i os.FileInfo) stamp {
	st, ok := i.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{size: i.Size(), mod: i.ModTime()}
	}
	return stamp{uint64(st.Dev), st.Ino, i.Size(), i.ModTime(), time.Unix(st.Ctim.Unix())}
}

// placeholders of a template.
const (
	ofContainer = "{container}"
	ofGroup     = "{group}"
)

// splitTemplate divides a template into the part without placeholders and the rest.
func splitTemplate(template string) (base, below string, err error) {
	template = filepath.Clean(template)
	if !filepath.IsAbs(template) {
		return "", "", fmt.Errorf("%q: expected an absolute path, such as /var/vcap/data/instance_identity/%s", template, ofContainer)
	}
	i := strings.IndexByte(template, '{')
	if i < 0 {
		return template, ".", nil
	}
	rest := strings.NewReplacer(ofContainer, "", ofGroup, "").Replace(template)
	if strings.ContainsAny(rest, "{}") {
		return "", "", fmt.Errorf("%q: expected no other placeholders than %s and %s", template, ofContainer, ofGroup)
	}
	i = strings.LastIndexByte(template[:i], '/') + 1
	return filepath.Clean(template[:i]), template[i:], nil
}

func newDirectory(cfg *Config, log *slog.Logger) (*directory, error) {
	base, below, err := splitTemplate(cfg.CertificateDirectory)
	if err != nil {
		return nil, err
	}
	d := &directory{base: base, below: below, cert: cfg.CertificateFile, key: cfg.KeyFile, clients: trusted{path: cfg.ClientCAFile, log: log}, log: log, pairs: map[endpoint.Key]*pair{}}
	if cfg.TrustDomain != "" {
		d.domain, err = authority.ParseTrustDomain(cfg.TrustDomain)
	}
	return d, err
}

// place returns where the endpoint's files are below base. What a record says names one directory and leads nowhere else.
func (d *directory) place(r endpoint.Record) (string, error) {
	for _, v := range []struct{ placeholder, value string }{{ofContainer, r.Container}, {ofGroup, r.Group}} {
		if strings.Contains(d.below, v.placeholder) && (v.value == "" || v.value == "." || v.value == ".." || len(v.value) > 255 || strings.ContainsAny(v.value, "/\x00")) {
			return "", fmt.Errorf("%.80q of endpoint %v cannot be the name of a directory, which certificate_directory wants for %s", v.value, r.Key, v.placeholder)
		}
	}
	return strings.NewReplacer(ofContainer, r.Container, ofGroup, r.Group).Replace(d.below), nil
}

func (d *directory) pairOf(k endpoint.Key) *pair {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.pairs[k]
	if p == nil {
		p = &pair{}
		d.pairs[k] = p
	}
	return p
}

// show implements certificates.
func (d *directory) show(r endpoint.Record) (*credential, error) {
	good, err := d.inspect(r)
	if good != nil {
		return good, nil
	}
	return nil, err
}

// inspect implements certificates: it reads the files again if they have changed. While they cannot be used, because half of the pair is new or
// because they have gone, it returns the last good pair beside the error.
func (d *directory) inspect(r endpoint.Record) (*credential, error) {
	p := d.pairOf(r.Key)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failure = d.look(p, r)
	text := ""
	if p.failure != nil {
		text = p.failure.Error()
	}
	if text != p.told {
		p.told = text
		if p.failure == nil {
			d.log.Info("certificate can be used again", "endpoint", r.Key, "expires", p.good.expires)
		} else {
			d.log.Warn("certificate cannot be used", "endpoint", r.Key, "error", p.failure, "earlier_one_shown", p.good != nil)
		}
	}
	return p.good, p.failure
}

// look reads the files of p if they have changed since the last time.
func (d *directory) look(p *pair, r endpoint.Record) error {
	below, err := d.place(r)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(d.base) // no link in it leads out of it
	if err != nil {
		return err
	}
	defer root.Close()
	names := [2]string{filepath.Join(below, d.cert), filepath.Join(below, d.key)}
	var now stamps
	for i, n := range names {
		info, err := root.Stat(n)
		if err != nil {
			p.files = stamps{}
			return fmt.Errorf("below %s: %w", d.base, err)
		}
		now[i] = stampOf(info)
	}
	if now == p.files && now.settled(p.read) {
		return p.failure
	}
	p.files, p.read = now, time.Now()
	var content [2][]byte
	for i, n := range names {
		if content[i], err = readFile(root, n); err != nil {
			p.files = stamps{} // no descriptor may have been left: it says nothing about the file
			return fmt.Errorf("below %s: %w", d.base, err)
		}
	}
	c, err := newCredential(content[0], content[1])
	if err != nil {
		return fmt.Errorf("%s and %s below %s: %w", names[0], names[1], d.base, err)
	}
	if p.good == nil || !same(p.good, c) {
		p.good = c
	}
	return nil
}

// same reports whether two credentials show the same.
func same(a, b *credential) bool {
	if len(a.pair.Certificate) != len(b.pair.Certificate) {
		return false
	}
	for i := range a.pair.Certificate {
		if string(a.pair.Certificate[i]) != string(b.pair.Certificate[i]) {
			return false
		}
	}
	return true // one key: it fits the certificate
}

// readFile reads a plain file, and waits for nobody to write it.
func readFile(root *os.Root, name string) ([]byte, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return readPlain(f)
}

// readPlain reads a file that was opened without waiting, and closes it.
func readPlain(f *os.File) ([]byte, error) {
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s: expected a plain file of at most %d bytes", f.Name(), maxFile)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err == nil && len(b) == 0 {
		err = fmt.Errorf("%s: %w", f.Name(), io.ErrUnexpectedEOF)
	}
	return b, err
}

// trust implements certificates.
func (d *directory) trust() (trust, error) {
	roots, err := d.clients.bundle()
	return trust{roots, d.domain}, err
}

// keep implements certificates.
func (d *directory) keep(records []endpoint.Record) {
	there := map[endpoint.Key]bool{}
	for _, r := range records {
		there[r.Key] = true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for k := range d.pairs {
		if !there[k] {
			delete(d.pairs, k)
		}
	}
}

// trusted is a file of authorities that is read again when it has changed.
type trusted struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	good    authority.Bundle
	failure error // of the last attempt; good is still used
	told    string
	file    stamps // the first one alone
	read    time.Time
}

// bundle returns the authorities. A file that cannot be used any more keeps its last good content, and is told of.
func (t *trusted) bundle() (authority.Bundle, error) {
	if t.path == "" {
		return authority.Bundle{}, errors.New("no authority of clients is configured: set client_ca_file")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failure = t.look()
	text := ""
	if t.failure != nil {
		text = t.failure.Error()
	}
	if text != t.told {
		t.told = text
		if t.failure == nil {
			t.log.Info("authorities of clients can be used again", "client_ca_file", t.path)
		} else {
			t.log.Warn("authorities of clients cannot be used", "client_ca_file", t.path, "error", t.failure, "earlier_ones_trusted", !t.good.IsZero())
		}
	}
	if t.failure != nil && t.good.IsZero() {
		return authority.Bundle{}, fmt.Errorf("client_ca_file: %w", t.failure)
	}
	return t.good, nil
}

// look reads the file if it has changed.
func (t *trusted) look() error {
	info, err := os.Stat(t.path)
	if err != nil {
		t.file = stamps{}
		return err
	}
	now := stamps{stampOf(info)}
	if now == t.file && now.settled(t.read) {
		return t.failure
	}
	read := time.Now()
	f, err := os.OpenFile(t.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	var b []byte
	if err == nil {
		b, err = readPlain(f)
	}
	if err != nil {
		t.file = stamps{} // no descriptor may have been left: it says nothing about the file
		return err
	}
	t.file, t.read = now, read
	good, err := authority.ParseBundle(b)
	if err == nil {
		t.good = good
	}
	return err
}
