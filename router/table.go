package router

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/m3o/m3o"
)

// What a table may hold. They bound memory, not use: one installation has
// thousands of hosts, not millions.
const (
	maxHosts      = 200_000
	maxEndpoints  = 1_000
	maxTableBytes = 128 << 20
	tableVersion  = 1
)

// The protocols an endpoint may speak.
const (
	HTTP1 = "http1" // HTTP/1.1, WebSocket included
	H2C   = "h2c"   // HTTP/2 without TLS (prior knowledge); upgrades still go by HTTP/1.1
	GRPC  = "grpc"  // nothing but gRPC, over H2C
	TCP   = "tcp"   // not probed; treated as HTTP1
)

// The kinds of a host.
const (
	KindApp = "app" // every request goes to Endpoints
	KindAPI = "api" // see Host.Kind
)

// A Table is everything the router serves from. It is immutable once it has
// been handed over: a change is a new Table.
type Table struct {
	// Domain is what the hosts are under: "localhost", "apps.example.org".
	// On localhost plain HTTP serves the apps too, see Config.Plain.
	Domain string `json:"domain"`
	Hosts  []Host `json:"hosts"`
}

// A Host says where the requests of one host name go.
type Host struct {
	Name    string `json:"name"`              // exact lower-case host, no port, no trailing dot
	App     string `json:"app,omitempty"`     // whose it is; empty only for KindAPI
	Release int    `json:"release,omitempty"` // the release its endpoints run
	// Endpoints are the ready ones: "ip:port" or "unix:/path". None is legal:
	// requests are told so with 503.
	Endpoints   []string `json:"endpoints,omitempty"`
	Protocol    string   `json:"protocol,omitempty"`    // HTTP1 when empty
	Descriptors string   `json:"descriptors,omitempty"` // absolute path of a FileDescriptorSet, "" for none
	// Kind is KindApp when empty. On a KindAPI host /m3o.v1.*/…, /-/… and /
	// go to Endpoints, and every other path is /<app>/…, which the Gateway
	// answers with that app.
	Kind     string `json:"kind,omitempty"`
	Redirect string `json:"redirect,omitempty"` // reserved; must be empty
}

// file is the JSON form of a Table, on the wire and on disk.
type file struct {
	Version int `json:"version"`
	Table
}

func encodeTable(t Table) ([]byte, error) {
	b, err := json.Marshal(file{tableVersion, t})
	if err != nil {
		return nil, fmt.Errorf("encode table: %w", err)
	}
	return b, nil
}

// decodeTable reads what encodeTable wrote and nothing else: unknown keys,
// another version, trailing bytes and whatever Validate refuses are errors.
func decodeTable(b []byte) (Table, error) {
	if len(b) > maxTableBytes {
		return Table{}, m3o.Errorf(m3o.Invalid, "table of %d bytes is larger than %d", len(b), maxTableBytes)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var f file
	if err := dec.Decode(&f); err != nil {
		return Table{}, m3o.Errorf(m3o.Invalid, "decode table: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Table{}, m3o.Errorf(m3o.Invalid, "decode table: more follows the table")
	}
	if f.Version != tableVersion {
		return Table{}, m3o.Errorf(m3o.Invalid, "table has version %d, this router reads %d", f.Version, tableVersion)
	}
	return f.Table, f.Table.Validate()
}

func hashOf(b []byte) string { h := sha256.Sum256(b); return hex.EncodeToString(h[:8]) }

// Validate reports every fault of the table at once, as one Invalid error.
func (t Table) Validate() error {
	var faults []string
	fault := func(format string, args ...any) {
		if len(faults) < 20 {
			faults = append(faults, fmt.Sprintf(format, args...))
		}
	}
	if !validHost(t.Domain) {
		fault("domain %q is not a lower-case host name", t.Domain)
	}
	if len(t.Hosts) > maxHosts {
		fault("%d hosts are more than %d", len(t.Hosts), maxHosts)
	}
	type release struct {
		app string
		n   int
	}
	names := make(map[string]bool, len(t.Hosts))
	first := make(map[release]*Host, len(t.Hosts))
	for i := range t.Hosts {
		h := &t.Hosts[i]
		if names[h.Name] {
			fault("host %q is there twice", h.Name)
		}
		names[h.Name] = true
		h.validate(fault)
		// Hosts of one release share its endpoints and so its in-flight count.
		key := release{h.App, h.Release}
		if o, ok := first[key]; !ok {
			first[key] = h
		} else if h.Kind == o.Kind && (h.Protocol != o.Protocol || h.Descriptors != o.Descriptors || !slices.Equal(h.Endpoints, o.Endpoints)) {
			fault("hosts %q and %q are both v%d of %q but differ", o.Name, h.Name, h.Release, h.App)
		}
	}
	if faults == nil {
		return nil
	}
	return &m3o.Error{Kind: m3o.Invalid, Msg: "bad table: " + strings.Join(faults, "; ")}
}

func (h *Host) validate(fault func(string, ...any)) {
	if !validHost(h.Name) {
		fault("host %q is not a lower-case host name", h.Name)
	}
	switch h.Kind {
	case "", KindApp:
		if err := m3o.CheckAppName(h.App); err != nil {
			fault("host %q: %v", h.Name, err)
		}
	case KindAPI:
	default:
		fault("host %q has the unknown kind %q", h.Name, h.Kind)
	}
	if h.Release < 0 {
		fault("host %q has release %d", h.Name, h.Release)
	}
	switch h.Protocol {
	case "", HTTP1, H2C, GRPC, TCP:
	default:
		fault("host %q has the unknown protocol %q", h.Name, h.Protocol)
	}
	if h.Redirect != "" {
		fault("host %q has a redirect, which this router does not know", h.Name)
	}
	if h.Descriptors != "" && (!filepath.IsAbs(h.Descriptors) || filepath.Clean(h.Descriptors) != h.Descriptors) {
		fault("host %q: descriptors %q is not a clean absolute path", h.Name, h.Descriptors)
	}
	if len(h.Endpoints) > maxEndpoints {
		fault("host %q has %d endpoints, more than %d", h.Name, len(h.Endpoints), maxEndpoints)
	}
	for i, e := range h.Endpoints {
		if _, _, err := splitEndpoint(e); err != nil {
			fault("host %q: %v", h.Name, err)
		}
		if slices.Contains(h.Endpoints[:i], e) {
			fault("host %q has endpoint %q twice", h.Name, e)
		}
	}
}

// splitEndpoint gives what net.Dial wants.
func splitEndpoint(e string) (network, address string, err error) {
	if p, ok := strings.CutPrefix(e, "unix:"); ok {
		if !filepath.IsAbs(p) || len(p) > 107 || strings.ContainsRune(p, 0) {
			return "", "", fmt.Errorf("endpoint %q: want an absolute path of at most 107 bytes", e)
		}
		return "unix", p, nil
	}
	ap, err := netip.ParseAddrPort(e)
	if err != nil || ap.Port() == 0 || ap.Addr().IsUnspecified() || ap.Addr().IsMulticast() {
		return "", "", fmt.Errorf("endpoint %q is neither ip:port nor unix:/path", e)
	}
	return "tcp", e, nil
}

// validHost accepts lower-case DNS names without a trailing dot.
func validHost(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if c := label[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

// hostOf is the name a Host header means: lower case, without port and
// trailing dot. It does not allocate for a name that is that already.
func hostOf(h string) string {
	if i := strings.LastIndexByte(h, ':'); i >= 0 && !strings.HasSuffix(h, "]") {
		h = h[:i]
	}
	return strings.ToLower(strings.TrimSuffix(h, "."))
}
