package certs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/libdns/libdns"
	"github.com/miekg/dns"
	"gopkg.in/yaml.v3"

	"github.com/m3o/m3o"
)

// A DNS sets and deletes TXT records for dns-01. The published libdns packages
// are more than this needs; these three reach everybody: the API most zones
// are at, the protocol all self-run servers speak, and a program for the rest.
type DNS interface {
	libdns.RecordAppender
	libdns.RecordDeleter
}

var (
	_ DNS = cloudflare{}
	_ DNS = rfc2136{}
	_ DNS = program{}
)

// OpenDNS reads which provider and its settings from a YAML file:
//
//	provider: cloudflare
//	token: …
//
//	provider: rfc2136
//	server: ns1.example.org:53
//	key: name of the TSIG key
//	secret: base64
//	algorithm: hmac-sha256
//
//	provider: exec
//	program: /usr/local/bin/dns-hook   # called with: set|delete, name, value
func OpenDNS(file string) (DNS, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, m3o.Errorf(m3o.Invalid, "read DNS settings: %w", err)
	}
	var c struct {
		Provider, Token, API, Server, Key, Secret, Algorithm, Program string
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		// The cause might quote a secret.
		return nil, m3o.Errorf(m3o.Invalid, "%s is not YAML with the keys provider, token, server, key, secret, algorithm, program", file)
	}
	lacks := func(key string) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s: provider %s needs the key %s", file, c.Provider, key), Hint: "docs/tls.md shows one of each"}
	}
	switch c.Provider {
	case "cloudflare":
		if c.Token == "" {
			return nil, lacks("token")
		}
		return cloudflare{cmp.Or(c.API, "https://api.cloudflare.com/client/v4"), m3o.Secret(c.Token)}, nil
	case "rfc2136":
		if c.Server == "" {
			return nil, lacks("server")
		}
		if (c.Key == "") != (c.Secret == "") {
			return nil, lacks("key with secret")
		}
		return rfc2136{c.Server, dns.Fqdn(c.Key), m3o.Secret(c.Secret), dns.Fqdn(cmp.Or(c.Algorithm, "hmac-sha256"))}, nil
	case "exec":
		if c.Program == "" {
			return nil, lacks("program")
		}
		return program{c.Program}, nil
	}
	return nil, m3o.Errorf(m3o.Invalid, "%s: provider %q is none of cloudflare, rfc2136, exec", file, c.Provider)
}

// cloudflare is Cloudflare's API, with a token that may edit the zone's DNS.
type cloudflare struct {
	api   string
	token m3o.Secret
}

func (c cloudflare) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.api+path, body)
	if err != nil {
		return fmt.Errorf("ask Cloudflare: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token.Reveal())
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("ask Cloudflare: %w", err)
	}
	defer res.Body.Close() //nolint:errcheck // read to the end or given up
	var r struct {
		Success bool
		Errors  []struct {
			Code    int
			Message string
		}
		Result json.RawMessage
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&r); err != nil {
		return fmt.Errorf("ask Cloudflare: %s: %w", res.Status, err)
	}
	if !r.Success {
		msg := res.Status
		if len(r.Errors) > 0 {
			msg = fmt.Sprintf("%s (%d)", r.Errors[0].Message, r.Errors[0].Code)
		}
		return fmt.Errorf("ask Cloudflare: %s", msg)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(r.Result, out)
}

type cfRecord struct {
	ID      string `json:"id,omitempty"`
	Type    string `json:"type"`
	Name    string `json:"name"`
	Content string `json:"content"`
	TTL     int    `json:"ttl,omitempty"`
}

func (c cloudflare) zone(ctx context.Context, zone string) (string, error) {
	var zs []struct{ ID string }
	if err := c.call(ctx, http.MethodGet, "/zones?name="+url.QueryEscape(strings.TrimSuffix(zone, ".")), nil, &zs); err != nil {
		return "", err
	}
	if len(zs) == 0 {
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: "the Cloudflare token sees no zone " + zone, Hint: "give the token Zone.DNS edit of that zone"}
	}
	return zs[0].ID, nil
}

// AppendRecords implements libdns.RecordAppender.
func (c cloudflare) AppendRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	id, err := c.zone(ctx, zone)
	if err != nil {
		return nil, err
	}
	for _, r := range recs {
		rr := r.RR()
		if err := c.call(ctx, http.MethodPost, "/zones/"+id+"/dns_records", cfRecord{Type: rr.Type, Name: absolute(rr.Name, zone), Content: rr.Data, TTL: 60}, nil); err != nil {
			return nil, err
		}
	}
	return recs, nil
}

// DeleteRecords implements libdns.RecordDeleter.
func (c cloudflare) DeleteRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	id, err := c.zone(ctx, zone)
	if err != nil {
		return nil, err
	}
	for _, r := range recs {
		rr := r.RR()
		var found []cfRecord
		if err := c.call(ctx, http.MethodGet, "/zones/"+id+"/dns_records?type="+rr.Type+"&name="+url.QueryEscape(absolute(rr.Name, zone)), nil, &found); err != nil {
			return nil, err
		}
		for _, f := range found {
			if strings.Trim(f.Content, `"`) != rr.Data {
				continue
			}
			if err := c.call(ctx, http.MethodDelete, "/zones/"+id+"/dns_records/"+f.ID, nil, nil); err != nil {
				return nil, err
			}
		}
	}
	return recs, nil
}

func absolute(name, zone string) string {
	return strings.TrimSuffix(libdns.AbsoluteName(name, zone), ".")
}

// rfc2136 is DNS UPDATE with TSIG: BIND, Knot, PowerDNS and most others.
type rfc2136 struct {
	server    string
	key       string
	secret    m3o.Secret
	algorithm string
}

func (p rfc2136) update(ctx context.Context, zone string, recs []libdns.Record, change func(*dns.Msg, []dns.RR)) ([]libdns.Record, error) {
	m := new(dns.Msg)
	m.SetUpdate(dns.Fqdn(zone))
	var rrs []dns.RR
	for _, r := range recs {
		rr := r.RR()
		rrs = append(rrs, &dns.TXT{Hdr: dns.RR_Header{Name: dns.Fqdn(absolute(rr.Name, zone)), Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}, Txt: []string{rr.Data}})
	}
	change(m, rrs)
	c := dns.Client{Net: "tcp", Timeout: 20 * time.Second}
	if p.secret != "" {
		c.TsigSecret = map[string]string{p.key: p.secret.Reveal()}
		m.SetTsig(p.key, p.algorithm, 300, time.Now().Unix())
	}
	res, _, err := c.ExchangeContext(ctx, m, p.server)
	if err != nil {
		return nil, fmt.Errorf("update DNS at %s: %w", p.server, err)
	}
	if res.Rcode != dns.RcodeSuccess {
		return nil, fmt.Errorf("update DNS at %s: %s", p.server, dns.RcodeToString[res.Rcode])
	}
	return recs, nil
}

// AppendRecords implements libdns.RecordAppender.
func (p rfc2136) AppendRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return p.update(ctx, zone, recs, (*dns.Msg).Insert)
}

// DeleteRecords implements libdns.RecordDeleter.
func (p rfc2136) DeleteRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return p.update(ctx, zone, recs, (*dns.Msg).Remove)
}

// program hands the work to the operator's own program.
type program struct{ path string }

func (p program) run(ctx context.Context, verb, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for _, r := range recs {
		rr := r.RR()
		cmd := exec.CommandContext(ctx, p.path, verb, absolute(rr.Name, zone), rr.Data)
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s %s: %w: %.200s", p.path, verb, err, out)
		}
	}
	return recs, nil
}

// AppendRecords implements libdns.RecordAppender.
func (p program) AppendRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return p.run(ctx, "set", zone, recs)
}

// DeleteRecords implements libdns.RecordDeleter.
func (p program) DeleteRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return p.run(ctx, "delete", zone, recs)
}
