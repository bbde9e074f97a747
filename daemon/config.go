package daemon

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks/advisory"
)

// Config is the daemon's own settings. Every field is a flag, a variable
// M3O_<FLAG> and a key of the configuration file, in that order of precedence;
// ParseConfig reads all three. The zero Config is completed by Validate.
type Config struct {
	Data     string // state directory; default /var/lib/m3o
	Domain   string // apps are served at <app>.<Domain>; default localhost
	HTTP     string // address of the router's plain listener
	HTTPS    string // address of the router's TLS listener
	SSH      string // address of the git server
	Nats     string // URL of an external NATS server; "" runs one in process
	NatsCred string // credentials file for Nats

	BuildkitAddr     string        // address of an external buildkitd; "" runs our own
	BuildTimeout     time.Duration // a build is stopped after this
	BuildConcurrency int           // builds at once; default 2
	BuildMemory      Bytes         // of all builds together, bytes; default 4 GB
	BuildPids        int           // processes and threads of all builds together; default 4096
	BuildDisk        Bytes         // what one step of a build may write; default 10 GB
	BuildCache       Bytes         // disk for layers and caches of builds, bytes; default 20 GB
	GoProxy          string        // where builds get modules and toolchains, as GOPROXY; default that of the go command here
	GoVulnDB         string        // address of a Go vulnerability database, or "off"; default GOVULNDB, or the Go project's
	Runtime          string        // "oci" or "process"
	Subnet           string        // addresses of instances
	Name             string        // tells installations on one host apart: network devices, firewall table, cgroups
	Bin              string        // directory of buildkitd, runc and m3o-shim; default beside m3od
	StopApps         bool          // stop the router and every instance when the daemon stops
	Drain            time.Duration // how long requests of an old release may go on after a switch
	ScaleDown        time.Duration // how long the load must have been low before autoscaling takes instances away

	// NotifyPrivate lets notifications go to private and loopback addresses, and by plain HTTP.
	NotifyPrivate bool

	LogLevel string // debug, info, warn or error

	ACMEEmail  string        // who gets mail about certificates; setting it agrees to the CA's terms
	ACMECA     string        // directory URL of the CA; Let's Encrypt when empty
	ACMEDNS    string        // file that says how to set DNS records of Domain, for its wildcard certificate
	ACMETrust  string        // PEM file of what the CA's own certificate is checked by; default the system's
	DNSServers string        // host:port,…: asked about domains instead of the system's
	LogAge     time.Duration // lines of apps' logs are kept this long
	LogSize    int           // MB kept of the logs of an app's instances that are gone
	Metrics    string        // address of GET /metrics for Prometheus; "" for none
	// OTLPEndpoint is the base URL of an OpenTelemetry collector (OTLP/HTTP) for
	// spans and metrics; "" for none.
	OTLPEndpoint string
	OTLPSample   string        // of requests' traces that begin here, 0 to 1; default 0.01
	OTLPInterval time.Duration // between two sendings of the metrics; default 1 min
	AccessLog    int           // requests a second that get a line in their app's log; default 1000, -1 for none

	DefaultAccess string // "public" or "private": who may use the URL of an app of which nothing was set

	Handover       time.Duration // how long requests may go on in a router that another version took over from
	TrustedProxies string        // addresses or networks, by commas, that may say whom they speak for
	ProxyProtocol  bool          // every connection begins with a PROXY head
	HTTP3          bool          // HTTP/3 on the UDP port of HTTPS
	ForgeCA        string        // file of certificates to believe of connected repositories, beside the system's
}

// option ties one field of Config to its flag, variable and key.
type option struct {
	name, usage string
	set         func(*Config, string) error
	get         func(*Config) string
	boolean     bool
}

func str(name, usage string, field func(*Config) *string) option {
	return option{name: name, usage: usage,
		set: func(c *Config, v string) error { *field(c) = v; return nil },
		get: func(c *Config) string { return *field(c) }}
}

func dur(name, usage string, field func(*Config) *time.Duration) option {
	return option{name: name, usage: usage,
		set: func(c *Config, v string) error {
			d, err := time.ParseDuration(v)
			if err != nil || d <= 0 {
				return fmt.Errorf("%q is not a duration such as 90s or 15m", v)
			}
			*field(c) = d
			return nil
		},
		get: func(c *Config) string { return field(c).String() }}
}

func number(name, usage string, field func(*Config) *int) option {
	return option{name: name, usage: usage,
		set: func(c *Config, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n < -1 {
				return fmt.Errorf("%q is not a number", v)
			}
			*field(c) = n
			return nil
		},
		get: func(c *Config) string { return strconv.Itoa(*field(c)) }}
}

func boolean(name, usage string, field func(*Config) *bool) option {
	return option{name: name, usage: usage, boolean: true,
		set: func(c *Config, v string) error {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return fmt.Errorf("%q is neither true nor false", v)
			}
			*field(c) = b
			return nil
		},
		get: func(c *Config) string { return strconv.FormatBool(*field(c)) }}
}

func whole(name, usage string, low, high int, field func(*Config) *int) option {
	return option{name: name, usage: usage,
		set: func(c *Config, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n < low || n > high {
				return fmt.Errorf("%q is not a whole number from %d to %d", v, low, high)
			}
			*field(c) = n
			return nil
		},
		get: func(c *Config) string { return strconv.Itoa(*field(c)) }}
}

// Bytes is a size in bytes, written as 512MB or 4GB.
type Bytes int64

func (b Bytes) String() string {
	if b%(1<<30) == 0 {
		return fmt.Sprintf("%dGB", b>>30)
	}
	return fmt.Sprintf("%dMB", b>>20)
}

func size(name, usage string, field func(*Config) *Bytes) option {
	return option{name: name, usage: usage,
		set: func(c *Config, v string) error {
			shift := 20
			num, ok := strings.CutSuffix(strings.ToUpper(v), "MB")
			if !ok {
				num, ok = strings.CutSuffix(num, "GB")
				shift = 30
			}
			n, err := strconv.ParseInt(num, 10, 32)
			if !ok || err != nil || n <= 0 {
				return fmt.Errorf("%q is not a size such as 512MB or 4GB", v)
			}
			*field(c) = Bytes(n << shift)
			return nil
		},
		get: func(c *Config) string { return field(c).String() }}
}

var options = []option{
	str("data", "state directory", func(c *Config) *string { return &c.Data }),
	str("domain", "apps are served at <app>.<domain>", func(c *Config) *string { return &c.Domain }),
	str("http", "address for plain HTTP", func(c *Config) *string { return &c.HTTP }),
	str("https", "address for HTTPS", func(c *Config) *string { return &c.HTTPS }),
	str("ssh", "address of the git server", func(c *Config) *string { return &c.SSH }),
	str("nats", "URL of an external NATS server (default: one in process)", func(c *Config) *string { return &c.Nats }),
	str("nats-creds", "credentials file for the external NATS server", func(c *Config) *string { return &c.NatsCred }),
	str("buildkit-addr", "address of an external buildkitd (default: our own)", func(c *Config) *string { return &c.BuildkitAddr }),
	dur("build-timeout", "a build is stopped after this", func(c *Config) *time.Duration { return &c.BuildTimeout }),
	whole("build-concurrency", "builds at once; users take turns", 1, 64, func(c *Config) *int { return &c.BuildConcurrency }),
	size("build-memory", "memory of all builds together, such as 4GB", func(c *Config) *Bytes { return &c.BuildMemory }),
	whole("build-pids", "processes and threads of all builds together", 64, 1<<20, func(c *Config) *int { return &c.BuildPids }),
	size("build-disk", "what one step of a build may write, such as 10GB", func(c *Config) *Bytes { return &c.BuildDisk }),
	size("build-cache", "disk for the layers and caches of builds, such as 20GB; the least used go first", func(c *Config) *Bytes { return &c.BuildCache }),
	str("goproxy", "where builds get Go modules and toolchains, a list as GOPROXY (default: GOPROXY, or what go env says)", func(c *Config) *string { return &c.GoProxy }),
	str("go-vuln-db", "Go vulnerability database that schedules for rebuild --if-outdated read: an https:// or file:/// address, or off (default: GOVULNDB, or https://vuln.go.dev)", func(c *Config) *string { return &c.GoVulnDB }),
	str("runtime", "oci (containers, needs root) or process (unisolated, for development)", func(c *Config) *string { return &c.Runtime }),
	str("subnet", "addresses of instances", func(c *Config) *string { return &c.Subnet }),
	str("name", "tells installations on one host apart, 1 to 7 of a-z and 0-9 (default m3o)", func(c *Config) *string { return &c.Name }),
	str("bin", "directory of buildkitd, runc and m3o-shim", func(c *Config) *string { return &c.Bin }),
	boolean("stop-apps", "stop the router and every app when the daemon stops", func(c *Config) *bool { return &c.StopApps }),
	str("forge-ca", "certificates to believe of connected repositories, beside the system's", func(c *Config) *string { return &c.ForgeCA }),
	dur("drain", "how long requests of an old release may go on after a switch", func(c *Config) *time.Duration { return &c.Drain }),
	dur("scale-down", "how long the load must have been low before autoscaling takes instances away", func(c *Config) *time.Duration { return &c.ScaleDown }),
	dur("handover", "how long requests may go on in the router that an upgrade replaced", func(c *Config) *time.Duration { return &c.Handover }),
	str("trusted-proxies", "addresses or networks, by commas, of proxies before the router whose X-Forwarded-For and -Proto count", func(c *Config) *string { return &c.TrustedProxies }),
	boolean("proxy-protocol", "every connection begins with a PROXY protocol head, version 1 or 2", func(c *Config) *bool { return &c.ProxyProtocol }),
	boolean("http3", "serve HTTP/3 too, on the UDP port beside https", func(c *Config) *bool { return &c.HTTP3 }),
	str("acme-email", "get certificates by ACME; the CA writes here, and its terms are agreed to (default: the internal CA only)", func(c *Config) *string { return &c.ACMEEmail }),
	str("acme-ca", "directory URL of the ACME CA (default Let's Encrypt)", func(c *Config) *string { return &c.ACMECA }),
	str("acme-dns", "file that says how to set DNS records of the domain, for a wildcard certificate", func(c *Config) *string { return &c.ACMEDNS }),
	str("acme-trust", "PEM file of certificates to trust the ACME CA by (default: the system's)", func(c *Config) *string { return &c.ACMETrust }),
	str("dns-servers", "host:port,… asked about domains (default: the system's)", func(c *Config) *string { return &c.DNSServers }),
	str("default-access", "who may use the URL of an app of which nothing was set: public or private", func(c *Config) *string { return &c.DefaultAccess }),
	boolean("notify-private", "notifications may go to private and loopback addresses, and by plain HTTP", func(c *Config) *bool { return &c.NotifyPrivate }),
	str("log-level", "debug, info, warn or error", func(c *Config) *string { return &c.LogLevel }),
	dur("log-age", "how long lines of apps' logs are kept (default 168h)", func(c *Config) *time.Duration { return &c.LogAge }),
	number("log-size", "MB that are kept of the logs of an app's instances that are gone (default 200)", func(c *Config) *int { return &c.LogSize }),
	str("metrics", "address where Prometheus finds /metrics, without authentication: 127.0.0.1:9464 (default: none)", func(c *Config) *string { return &c.Metrics }),
	str("otlp-endpoint", "OpenTelemetry collector (OTLP/HTTP) that gets traces and metrics: http://127.0.0.1:4318 (default: OTEL_EXPORTER_OTLP_ENDPOINT, or none)", func(c *Config) *string { return &c.OTLPEndpoint }),
	str("otlp-sample", "share of the requests that are traced, 0 to 1 (default: OTEL_TRACES_SAMPLER_ARG, or 0.01)", func(c *Config) *string { return &c.OTLPSample }),
	dur("otlp-interval", "how often the collector gets the metrics (default: OTEL_METRIC_EXPORT_INTERVAL, or 1m)", func(c *Config) *time.Duration { return &c.OTLPInterval }),
	number("access-log", "how many requests a second, of all apps together, get a line in their app's log (default 1000, -1 for none)", func(c *Config) *int { return &c.AccessLog }),
}

// defaultSubnet is for benchmarks of networks (RFC 2544), so no host has it.
const defaultSubnet = "198.18.0.0/16"

// DefaultConfigFile is read when it exists and --config does not name another.
const DefaultConfigFile = "/etc/m3o/m3od.yaml"

// ParseConfig reads the configuration file, then M3O_* variables, then args,
// each overriding the one before, and validates the result. flag.ErrHelp comes
// back as it is. Every other error is m3o.Invalid and names where the value stood.
func ParseConfig(args []string, getenv func(string) string, usage func(*flag.FlagSet)) (Config, error) {
	var c Config
	fset := flag.NewFlagSet("m3od", flag.ContinueOnError)
	fset.SetOutput(devNull{})
	file := fset.String("config", "", "configuration file (default "+DefaultConfigFile+" when it exists)")
	given := map[string]string{}
	for _, o := range options {
		put := func(v string) error { given[o.name] = v; return nil }
		if o.boolean {
			fset.BoolFunc(o.name, o.usage, put)
		} else {
			fset.Func(o.name, o.usage, put)
		}
	}
	fset.Usage = func() {} // a mistyped flag gets one line, not the whole list
	if err := fset.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			if usage != nil {
				usage(fset)
			}
			return c, err
		}
		return c, &m3o.Error{Kind: m3o.Invalid, Msg: err.Error(), Hint: "m3od --help lists the flags", Err: err}
	}
	if fset.NArg() > 0 {
		return c, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("unexpected argument %q", fset.Arg(0)), Hint: "m3od --help lists the flags"}
	}
	if err := readConfigFile(&c, *file); err != nil {
		return c, err
	}
	for _, o := range options {
		key := "M3O_" + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
		if v := getenv(key); v != "" {
			if err := o.set(&c, v); err != nil {
				return c, m3o.Errorf(m3o.Invalid, "variable %s: %w", key, err)
			}
		}
		if v, ok := given[o.name]; ok {
			if err := o.set(&c, v); err != nil {
				return c, m3o.Errorf(m3o.Invalid, "flag --%s: %w", o.name, err)
			}
		}
	}
	c.otelFrom(getenv)
	return c, c.Validate()
}

type devNull struct{}

func (devNull) Write(p []byte) (int, error) { return len(p), nil }

func readConfigFile(c *Config, path string) error {
	named := path != ""
	if !named {
		path = DefaultConfigFile
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return nil
	}
	if err != nil {
		return m3o.Errorf(m3o.Invalid, "read configuration file: %w", err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return m3o.Errorf(m3o.Invalid, "%s: %w", path, err)
	}
	if len(doc.Content) == 0 {
		return nil
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return m3o.Errorf(m3o.Invalid, "%s:%d: want lines of the form key: value", path, root.Line)
	}
	for i := 0; i+1 < len(root.Content); i += 2 {
		k, v := root.Content[i], root.Content[i+1]
		n := slices.IndexFunc(options, func(o option) bool { return o.name == k.Value })
		if n < 0 {
			names := make([]string, len(options))
			for i, o := range options {
				names[i] = o.name
			}
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s:%d: unknown key %q", path, k.Line, k.Value),
				Hint: "the keys are " + strings.Join(names, ", ")}
		}
		if v.Kind != yaml.ScalarNode {
			return m3o.Errorf(m3o.Invalid, "%s:%d: %s takes a single value", path, v.Line, k.Value)
		}
		if err := options[n].set(c, v.Value); err != nil {
			return m3o.Errorf(m3o.Invalid, "%s:%d: %s: %w", path, v.Line, k.Value, err)
		}
	}
	return nil
}

// Validate completes zero fields with their defaults and reports every fault
// at once, as one m3o.Invalid error.
func (c *Config) Validate() error {
	def := func(f *string, v string) {
		if *f == "" {
			*f = v
		}
	}
	def(&c.Data, "/var/lib/m3o")
	def(&c.Domain, "localhost")
	if c.Local() {
		def(&c.HTTP, "127.0.0.1:8080")
		def(&c.HTTPS, "127.0.0.1:8443")
		def(&c.SSH, "127.0.0.1:2222")
	}
	def(&c.HTTP, ":80")
	def(&c.HTTPS, ":443")
	def(&c.SSH, ":2222")
	def(&c.Runtime, "oci")
	def(&c.Subnet, defaultSubnet)
	def(&c.Name, "m3o")
	def(&c.LogLevel, "info")
	c.LogAge = cmp.Or(c.LogAge, 7*24*time.Hour)
	c.LogSize = cmp.Or(c.LogSize, 200)
	c.AccessLog = cmp.Or(c.AccessLog, 1000)
	def(&c.OTLPSample, "0.01")
	c.OTLPInterval = cmp.Or(c.OTLPInterval, time.Minute)
	def(&c.DefaultAccess, "public")
	if c.BuildTimeout == 0 {
		c.BuildTimeout = 15 * time.Minute
	}
	c.BuildConcurrency = cmp.Or(c.BuildConcurrency, 2)
	c.BuildMemory = cmp.Or(c.BuildMemory, 4<<30)
	c.BuildPids = cmp.Or(c.BuildPids, 4096)
	c.BuildDisk = cmp.Or(c.BuildDisk, 10<<30)
	c.BuildCache = cmp.Or(c.BuildCache, 20<<30)
	if c.Handover == 0 {
		c.Handover = 10 * time.Minute
	}
	if c.ScaleDown == 0 {
		c.ScaleDown = 3 * time.Minute
	}
	if c.Drain == 0 {
		c.Drain = 30 * time.Second
	}
	if c.Bin == "" {
		exe, err := os.Executable()
		if err != nil {
			return m3o.Errorf(m3o.Internal, "find own directory: %w", err)
		}
		c.Bin = filepath.Dir(exe)
	}
	var faults []string
	bad := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if abs, err := filepath.Abs(c.Data); err != nil {
		bad("data: %v", err)
	} else {
		c.Data = abs
	}
	if strings.ToLower(c.Domain) != c.Domain || strings.HasPrefix(c.Domain, ".") || strings.ContainsAny(c.Domain, ":/ *") {
		bad("domain: %q is not a lower-case host name", c.Domain)
	}
	seen := map[string]string{}
	for _, a := range []struct{ name, addr string }{{"http", c.HTTP}, {"https", c.HTTPS}, {"ssh", c.SSH}} {
		if _, port, err := net.SplitHostPort(a.addr); err != nil {
			bad("%s: %q is not host:port", a.name, a.addr)
		} else if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
			bad("%s: %q has no port from 0 to 65535", a.name, a.addr)
		} else if other := seen[a.addr]; other != "" && n != 0 {
			bad("%s: %s is the address of %s too", a.name, a.addr, other)
		}
		seen[a.addr] = a.name
	}
	if p, err := netip.ParsePrefix(c.Subnet); err != nil || !p.Addr().Is4() || p.Bits() > 24 {
		bad("subnet: %q is not an IPv4 network of at least /24, such as 198.18.0.0/16", c.Subnet)
	}
	if len(c.Name) > 7 || strings.Trim(c.Name, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		bad("name: %q is not 1 to 7 of a-z and 0-9", c.Name)
	}
	if len(c.Data) > 80 {
		bad("data: %s is longer than 80 characters, too long for the sockets in it", c.Data)
	}
	if !slices.Contains([]string{"oci", "process"}, c.Runtime) {
		bad("runtime: %q is neither oci nor process", c.Runtime)
	}
	if v := c.vulnDB(); v != "off" {
		if _, err := advisory.Open(v); err != nil {
			bad("go-vuln-db: %v", err)
		}
	}
	if c.OTLPEndpoint != "" {
		if err := c.otlp("", "", nil).Validate(); err != nil {
			bad("otlp-endpoint, otlp-sample: %v", err)
		}
	}
	if got := c.trustedProxies(); len(got) != len(fields(c.TrustedProxies)) {
		bad("trusted-proxies: %q is not a list of addresses and networks", c.TrustedProxies)
	}
	if c.HTTP3 && c.ProxyProtocol {
		bad("http3: a proxy that speaks the PROXY protocol passes no UDP on; leave one of the two out")
	}
	if c.ACMECA != "" && !strings.HasPrefix(c.ACMECA, "https://") {
		bad("acme-ca: %q is no https:// URL", c.ACMECA)
	}
	if c.ACMEEmail != "" && (!strings.Contains(c.ACMEEmail, "@") || strings.ContainsAny(c.ACMEEmail, " ,<>")) {
		bad("acme-email: %q is no address", c.ACMEEmail)
	}
	if c.ACME() && c.Local() {
		bad("acme-email, acme-ca: no CA issues for %s; the internal one does", c.Domain)
	}
	if c.ACMEDNS != "" && !c.ACME() {
		bad("acme-dns: needs acme-email or acme-ca")
	}
	for _, s := range c.resolvers() {
		if _, port, err := net.SplitHostPort(s); err != nil || port == "" {
			bad("dns-servers: %q is not host:port", s)
		}
	}
	if !slices.Contains([]string{"public", "private"}, c.DefaultAccess) {
		bad("default-access: %q is neither public nor private", c.DefaultAccess)
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		bad("log-level: %q is none of debug, info, warn, error", c.LogLevel)
	}
	if len(faults) > 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "configuration: " + strings.Join(faults, "; "), Hint: "m3od --help lists the settings"}
	}
	return nil
}

// ACME reports whether certificates come from an ACME CA.
func (c *Config) ACME() bool { return c.ACMEEmail != "" || c.ACMECA != "" }

// resolvers are the name servers to ask, none for the system's.
func (c *Config) resolvers() []string {
	return fields(c.DNSServers)
}

// trustedProxies are the networks in TrustedProxies that can be read.
func (c *Config) trustedProxies() []netip.Prefix {
	var out []netip.Prefix
	for _, s := range fields(c.TrustedProxies) {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		} else if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

func fields(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// Local reports whether the domain is localhost: certificates come from the
// internal CA and plain HTTP is served too.
func (c *Config) Local() bool {
	return c.Domain == "localhost" || strings.HasSuffix(c.Domain, ".localhost")
}

func (c *Config) path(elem ...string) string {
	return filepath.Join(append([]string{c.Data}, elem...)...)
}
