package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// domainsCommands are an app's own hosts, their certificates, and what its
// hosts do with requests.
func domainsCommands() []*command {
	return []*command{
		{name: "domains", aliases: []string{"domains:list"}, group: "Domains", app: true, run: runDomains, short: "List the domains of an app"},
		{name: "domains:add", group: "Domains", args: "DOMAIN", min: 1, max: 1, app: true, run: runDomainsAdd,
			short: "Serve an app at a domain of your own",
			long: `Point the domain's DNS here as the command prints: a CNAME to the app's host or, for a domain that can have none, A and AAAA
records. The certificate comes by itself where the server has a CA (m3od --acme-email); m3o domains:wait returns once both are
there. A domain belongs to one app, and its names to one owner.

*.shop.example serves every name one label under shop.example; its certificate has to be brought by m3o certs:add.`,
			example: "m3o domains:add shop.example --www\nm3o domains:add old.example --redirect-to shop.example",
			flags: []flag{{"www", "", "", "www.DOMAIN too, sent on to DOMAIN"},
				{"redirect-to", "", "DOMAIN", "send every request on to this domain of the app"}}},
		{name: "domains:remove", aliases: []string{"domains:del"}, group: "Domains", args: "DOMAIN", min: 1, max: 1, app: true, run: runDomainsRemove,
			short: "Stop serving an app at a domain"},
		{name: "domains:wait", group: "Domains", args: "DOMAIN", min: 1, max: 1, app: true, run: runDomainsWait,
			short: "Wait until a domain leads here and has a certificate", flags: []flag{{"timeout", "", "DURATION", "give up after this (default 10m)"}}},
		{name: "certs", aliases: []string{"certs:list"}, group: "Domains", app: true, run: runCerts, short: "List the certificates of an app"},
		{name: "certs:add", group: "Domains", args: "CERT KEY", min: 2, max: 2, app: true, run: runCertsAdd, completes: "file",
			short:   "Serve a certificate of your own, PEM files",
			long:    "CERT has the certificate and its chain; KEY is kept sealed and never given out. Its names must be domains of the app.",
			example: "m3o certs:add shop.crt shop.key -a shop"},
		{name: "certs:remove", group: "Domains", args: "ID", min: 1, max: 1, app: true, run: runCertsRemove, short: "Remove a certificate of your own"},

		{name: "maintenance", aliases: []string{"maintenance:status"}, group: "Running", app: true, run: runTraffic, short: "Show whether an app is in maintenance or paused"},
		{name: "maintenance:on", group: "Running", app: true, run: setTraffic("maintenance", true), short: "Answer 503 in the app's stead",
			long: "On all its hosts, in the form the caller asks for: a page, JSON or a gRPC status. Its instances go on."},
		{name: "maintenance:off", group: "Running", app: true, run: setTraffic("maintenance", false), short: "Let requests reach the app again"},
		{name: "pause", group: "Running", app: true, run: setTraffic("paused", true), short: "Hold an app's requests, for a migration",
			long: "Requests wait, half a minute at most, until m3o resume; those in flight go on."},
		{name: "resume", group: "Running", app: true, run: setTraffic("paused", false), short: "Let held requests go on"},
	}
}

func domainRow(d *m3ov1.Domain) []string {
	state := plain(d.GetCertificate())
	if d.GetExpires() != nil {
		state += " until " + d.GetExpires().AsTime().Format(time.DateOnly)
	}
	to := "the app"
	if d.GetRedirect() != "" {
		to = "→ " + plain(d.GetRedirect())
	}
	return []string{plain(d.GetName()), to, state, plain(d.GetError())}
}

func runDomains(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.domains.List, &m3ov1.ListDomainsRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		rows := [][]string{{plain(res.GetHost()), "the app", "", ""}}
		for _, d := range res.GetDomains() {
			rows = append(rows, domainRow(d))
		}
		c.table([]string{"DOMAIN", "SERVES", "CERTIFICATE", "PROBLEM"}, rows)
	})
}

func runDomainsAdd(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.domains.Add, &m3ov1.AddDomainRequest{App: app, Name: c.args[0], Redirect: c.value("redirect-to"), Www: c.has("www")})
	if err != nil {
		return err
	}
	if err := c.result(res, func() {
		for _, d := range res.GetDomains() {
			c.print("added %s\n", plain(d.GetName()))
		}
	}); err != nil {
		return err
	}
	for _, d := range res.GetDomains() {
		switch d.GetDns() {
		case "ok", "unchecked":
			continue
		case "elsewhere":
			c.say("%s leads to %s, not here yet", plain(d.GetName()), plain(strings.Join(d.GetFound(), ", ")))
		}
		c.say("set in DNS: %s CNAME %s", plain(d.GetName()), plain(res.GetHost()))
		if a := strings.Join(res.GetAddresses(), ", "); a != "" {
			c.say("       or, at the top of a zone, its addresses: %s", plain(a))
		}
	}
	c.hint("m3o domains:wait %s -a %s", plain(res.GetDomains()[0].GetName()), app)
	c.undo("m3o domains:remove %s -a %s", plain(res.GetDomains()[0].GetName()), app)
	return nil
}

func runDomainsRemove(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.domains.Remove, &m3ov1.RemoveDomainRequest{App: app, Name: c.args[0]})
	if err != nil {
		return err
	}
	if err := c.result(res, func() { c.print("removed %s\n", plain(res.GetDomain().GetName())) }); err != nil {
		return err
	}
	back := "m3o domains:add " + plain(res.GetDomain().GetName())
	if r := res.GetDomain().GetRedirect(); r != "" {
		back += " --redirect-to " + plain(r)
	}
	c.undo("%s -a %s", back, app)
	return nil
}

// domainPause is the time between two looks.
const domainPause = 2 * time.Second

func runDomainsWait(ctx context.Context, c *call) error {
	timeout := 10 * time.Minute
	if c.has("timeout") {
		var err error
		if timeout, err = time.ParseDuration(c.value("timeout")); err != nil || timeout <= 0 {
			return misuse(quoted(c.value("timeout"))+" is no duration", "--timeout 5m")
		}
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(timeout)
	last := ""
	for {
		res, err := ask(ctx, cl.domains.Check, &m3ov1.CheckDomainRequest{App: app, Name: strings.ToLower(c.args[0])})
		if err != nil {
			return err
		}
		d := res.GetDomain()
		dnsReady := d.GetDns() == "ok" || d.GetDns() == "unchecked"
		if dnsReady && d.GetCertificate() != "pending" {
			return c.result(res, func() { c.print("%s is served, certificate: %s\n", plain(d.GetName()), domainRow(d)[2]) })
		}
		now := "waiting for DNS: " + plain(d.GetDns())
		if dnsReady {
			now = "waiting for the certificate"
			if d.GetError() != "" {
				now += ": " + plain(d.GetError())
			}
		}
		if now != last {
			c.say("%s", now)
			last = now
		}
		if time.Now().After(deadline) {
			return fail(fmt.Sprintf("%s is not ready after %v: %s", plain(d.GetName()), timeout, now), "m3o domains -a "+app)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(domainPause):
		}
	}
}

func certRow(k *m3ov1.Certificate) []string {
	id := k.GetId()
	if !k.GetOwn() {
		id = "(issued)"
	}
	return []string{plain(id), plain(strings.Join(k.GetNames(), " ")), plain(k.GetIssuer()), until(k), plain(k.GetError())}
}

func until(k *m3ov1.Certificate) string {
	if k.GetExpires() == nil {
		return ""
	}
	return k.GetExpires().AsTime().Format(time.DateOnly)
}

func runCerts(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.certs.List, &m3ov1.ListCertificatesRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetCertificates()) == 0 {
			c.say("%s has no certificate of its own", app)
			c.hint("m3o domains:add DOMAIN, or m3o certs:add CERT KEY")
			return
		}
		var rows [][]string
		for _, k := range res.GetCertificates() {
			rows = append(rows, certRow(k))
		}
		c.table([]string{"ID", "NAMES", "ISSUER", "UNTIL", "PROBLEM"}, rows)
	})
}

// readPEM reads a file of at most 256 KB that holds a block of that kind.
func readPEM(path, kind string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, misuse(err.Error(), "m3o certs:add CERT KEY")
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, 256<<10))
	if err != nil {
		return nil, misuse(err.Error(), "")
	}
	if block, _ := pem.Decode(b); block == nil || !bytes.Contains([]byte(block.Type), []byte(kind)) {
		return nil, misuse(quoted(path)+" does not begin with a PEM "+strings.ToLower(kind), "m3o certs:add CERT KEY, both PEM")
	}
	return b, nil
}

func runCertsAdd(ctx context.Context, c *call) error {
	chain, err := readPEM(c.args[0], "CERTIFICATE")
	if err != nil {
		return err
	}
	key, err := readPEM(c.args[1], "KEY")
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.certs.Add, &m3ov1.AddCertificateRequest{App: app, Chain: chain, Key: key})
	if err != nil {
		return err
	}
	k := res.GetCertificate()
	if err := c.result(res, func() { c.print("serving %s until %s\n", plain(strings.Join(k.GetNames(), ", ")), until(k)) }); err != nil {
		return err
	}
	c.undo("m3o certs:remove %s -a %s", plain(k.GetId()), app)
	return nil
}

func runCertsRemove(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.certs.Remove, &m3ov1.RemoveCertificateRequest{App: app, Id: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("removed the certificate of %s\n", plain(strings.Join(res.GetCertificate().GetNames(), ", ")))
	})
}

func trafficWords(maintenance, paused bool) string {
	switch {
	case maintenance:
		return "in maintenance: requests are answered 503"
	case paused:
		return "paused: requests wait"
	}
	return "served"
}

func runTraffic(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.traffic.Get, &m3ov1.GetTrafficRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("%s is %s\n", app, trafficWords(res.GetMaintenance(), res.GetPaused())) })
}

// setTraffic makes the command that turns one of the two on or off.
func setTraffic(what string, on bool) func(context.Context, *call) error {
	return func(ctx context.Context, c *call) error {
		app, cl, err := c.withApp(ctx)
		if err != nil {
			return err
		}
		req := &m3ov1.SetTrafficRequest{App: app, Maintenance: &on}
		back := "m3o maintenance:off"
		if what == "paused" {
			req, back = &m3ov1.SetTrafficRequest{App: app, Paused: &on}, "m3o resume"
		}
		res, err := ask(ctx, cl.traffic.Set, req)
		if err != nil {
			return err
		}
		if err := c.result(res, func() { c.print("%s is %s\n", app, trafficWords(res.GetMaintenance(), res.GetPaused())) }); err != nil {
			return err
		}
		if on {
			c.undo("%s -a %s", back, app)
		}
		return nil
	}
}
