package router

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
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
	KindApp     = "app"     // every request goes to Endpoints
	KindAPI     = "api"     // see Host.Kind
	KindRelease = "release" // like KindApp, the permanent host of one release; never what api.<domain>/<app>/… means
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
	Name    string `json:"name"`              // exact lower-case host, no port, no trailing dot; "*.x.org" for every name one label under x.org
	App     string `json:"app,omitempty"`     // whose it is; empty only for KindAPI
	Release int    `json:"release,omitempty"` // the release its endpoints run
	// Endpoints are the ready ones: "ip:port" or "unix:/path". None is legal:
	// requests are told so with 503.
	Endpoints   []string `json:"endpoints,omitempty"`
	Protocol    string   `json:"protocol,omitempty"`    // HTTP1 when empty
	Descriptors string   `json:"descriptors,omitempty"` // absolute path of a FileDescriptorSet, "" for none
	Origins     []string `json:"origins,omitempty"`     // see m3o.API
	StrictJSON  bool     `json:"strict_json,omitempty"` // see m3o.API
	// Kind is KindApp when empty. On a KindAPI host /m3o.v1.*/…, /hooks/…, /-/… and /
	// go to Endpoints, and every other path is /<app>/…, which the Gateway
	// answers with that app.
	Kind string `json:"kind,omitempty"`
	// Redirect is a host that every request is sent on to with 308, path and
	// query kept: www.x.org to x.org. A host with it needs no endpoints.
	Redirect string `json:"redirect,omitempty"`
	// Asleep says that the app was stopped because nobody used it: requests
	// wait while the daemon is asked for an endpoint (Client.Asks).
	Asleep bool `json:"asleep,omitempty"`
	// Hold makes requests wait while there is no endpoint, because one is
	// about to come.
	Hold bool `json:"hold,omitempty"`
	// Maintenance answers every request with 503 in the app's stead.
	Maintenance bool `json:"maintenance,omitempty"`
	// Paused holds requests until it is false again, for Limits.Hold at most.
	Paused bool    `json:"paused,omitempty"`
	Policy *Policy `json:"policy,omitempty"` // nil: everybody may everything
	Canary *Canary `json:"canary,omitempty"` // another release that takes a part of the requests
}

// A Change is what one table has and another has not, so that the work of a
// change does not grow with the table.
type Change struct {
	Base   string   `json:"base"` // hash of the table it is about; any other is a Conflict
	Set    []Host   `json:"set,omitempty"`
	Remove []string `json:"remove,omitempty"` // names; one that is not there is no error
}

// digest is a hash of a set of rows that does not depend on their order, so that
// a change costs no more than its own rows: the sum of the rows' hashes.
type digest [2]uint64

func (s digest) add(o digest) digest { return digest{s[0] + o[0], s[1] + o[1]} }
func (s digest) sub(o digest) digest { return digest{s[0] - o[0], s[1] - o[1]} }

func (s digest) String() string { return fmt.Sprintf("%016x%016x", s[0], s[1]) }

func sumOf(v any) digest {
	b, _ := json.Marshal(v) // strings, numbers and flags cannot fail
	h := sha256.Sum256(b)
	return digest{binary.BigEndian.Uint64(h[:]), binary.BigEndian.Uint64(h[8:])}
}

// TableHash is what Status.Table and Change.Base are for t.
func TableHash(t Table) string {
	s := sumOf(t.Domain)
	for i := range t.Hosts {
		s = s.add(sumOf(&t.Hosts[i]))
	}
	return s.String()
}

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
	validateHosts(t.Hosts, nil, fault)
	return badTable(faults)
}

// Validate reports every fault of the change at once, as one Invalid error.
func (c Change) Validate() error {
	var faults []string
	fault := func(format string, args ...any) {
		if len(faults) < 20 {
			faults = append(faults, fmt.Sprintf(format, args...))
		}
	}
	validateHosts(c.Set, c.Remove, fault)
	return badTable(faults)
}

func badTable(faults []string) error {
	if faults == nil {
		return nil
	}
	return &m3o.Error{Kind: m3o.Invalid, Msg: "bad table: " + strings.Join(faults, "; ")}
}

func validateHosts(hosts []Host, other []string, fault func(string, ...any)) {
	names := make(map[string]bool, len(hosts)+len(other))
	for _, n := range other {
		names[n] = true
	}
	first := make(map[releaseID]*Host, len(hosts))
	for i := range hosts {
		h := &hosts[i]
		if names[h.Name] {
			fault("host %q is there twice", h.Name)
		}
		names[h.Name] = true
		h.validate(fault)
		if h.Redirect != "" {
			continue
		}
		// Hosts of one release share its endpoints and so its in-flight count.
		key := releaseID{h.App, h.Release}
		if o, ok := first[key]; !ok {
			first[key] = h
		} else if h.Protocol != o.Protocol || h.Descriptors != o.Descriptors || !slices.Equal(h.Endpoints, o.Endpoints) {
			fault("hosts %q and %q are both v%d of %q but differ", o.Name, h.Name, h.Release, h.App)
		}
	}
}

func (h *Host) validate(fault func(string, ...any)) {
	if parent, wild := strings.CutPrefix(h.Name, "*."); !validHost(h.Name) && (!wild || !validHost(parent)) {
		fault("host %q is not a lower-case host name", h.Name)
	}
	switch h.Kind {
	case "", KindApp, KindRelease:
		if err := checkApp(h.App); err != nil {
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
	if h.Redirect != "" && (!validHost(h.Redirect) || h.Redirect == h.Name) {
		fault("host %q cannot redirect to %q", h.Name, h.Redirect)
	}
	if h.Descriptors != "" && (!filepath.IsAbs(h.Descriptors) || filepath.Clean(h.Descriptors) != h.Descriptors) {
		fault("host %q: descriptors %q is not a clean absolute path", h.Name, h.Descriptors)
	}
	validateEndpoints(h.Name, h.Endpoints, fault)
	if h.Policy != nil {
		h.Policy.validate(fault)
	}
	if h.Canary != nil {
		h.Canary.validate(h, fault)
	}
}

func validateEndpoints(name string, endpoints []string, fault func(string, ...any)) {
	if len(endpoints) > maxEndpoints {
		fault("host %q has %d endpoints, more than %d", name, len(endpoints), maxEndpoints)
	}
	for i, e := range endpoints {
		if _, _, err := splitEndpoint(e); err != nil {
			fault("host %q: %v", name, err)
		}
		if slices.Contains(endpoints[:i], e) {
			fault("host %q has endpoint %q twice", name, e)
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

// checkApp accepts the names of apps and those the platform makes of them,
// such as pr-7--app.
func checkApp(name string) error {
	if i := strings.LastIndex(name, "--"); i > 0 && validHost(name) {
		name = name[i+2:]
	}
	return m3o.CheckName(name)
}
