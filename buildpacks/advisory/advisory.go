// Package advisory reads a database of known faults in Go modules, such as
// https://vuln.go.dev, and says which of them the modules of a program have.
// The layout is that of https://go.dev/security/vuln/database: index/modules.json
// and one ID/<id>.json an advisory, in the OSV schema. Nothing of the program is
// sent but the ids of advisories that may concern it.
//
// It knows nothing of builds, releases or apps.
package advisory

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	goversion "go/version"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/semver"

	"github.com/m3o/m3o"
)

// Default is the database of the Go project.
const Default = "https://vuln.go.dev"

// Bounds of what is read. The index of the Go project has 1 MB.
const (
	maxIndex  = 64 << 20
	maxEntry  = 8 << 20
	maxAsked  = 1000 // entries of one question
	readTime  = 30 * time.Second
	userAgent = "m3o"
	stdlib    = "stdlib" // what the database calls the standard library
)

// A Module is one that a program has in it. The standard library is "std"
// with the version of the toolchain, go1.26.8.
type Module struct{ Path, Version string }

// An Advisory is a known fault that a module has.
type Advisory struct {
	ID        string // "GO-2024-2687"
	Module    Module
	Fixed     string    // the first later version without it, "" when there is none
	Summary   string    // one line
	Published time.Time // UTC
}

// String names the advisory, the module and what to move to.
func (a Advisory) String() string {
	s := fmt.Sprintf("%s in %s %s", a.ID, a.Module.Path, a.Module.Version)
	if a.Fixed != "" {
		s += ", fixed in " + a.Fixed
	}
	return s
}

// A DB is a database. It is safe for concurrent use and keeps nothing.
type DB struct {
	base *url.URL
	http *http.Client
}

// Open checks the address of a database, which is an https, http or file one.
// Nothing is read yet.
func Open(address string) (*DB, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "file" && (u.Host == "" || u.Scheme != "https" && u.Scheme != "http") || u.Scheme == "file" && !filepath.IsAbs(u.Path) {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the Go vulnerability database is no https:// or file:/// address", Hint: "such as " + Default + ", or off"}
	}
	return &DB{base: u, http: &http.Client{Timeout: readTime}}, nil
}

// Affecting lists the advisories that modules have, by id. Modules without a
// version that can be compared, such as the main one, are left out. The error
// is Unavailable when the database cannot be read.
func (db *DB) Affecting(ctx context.Context, modules []Module) ([]Advisory, error) {
	b, err := db.read(ctx, "index/modules.json", maxIndex)
	if err != nil {
		return nil, db.away(err)
	}
	index, err := parseIndex(b)
	if err != nil {
		return nil, db.away(err)
	}
	var out []Advisory
	asked := 0
	for _, m := range modules {
		v := canonical(m)
		if v == "" {
			continue
		}
		for _, id := range index[nameIn(m)].mayAffect(v) {
			if asked++; asked > maxAsked {
				return nil, db.away(fmt.Errorf("more than %d advisories may concern the modules", maxAsked))
			}
			b, err := db.read(ctx, "ID/"+id+".json", maxEntry)
			if err != nil {
				return nil, db.away(err)
			}
			e, err := parseEntry(b)
			if err != nil {
				return nil, db.away(fmt.Errorf("%s: %w", id, err))
			}
			if fixed, yes := e.affects(nameIn(m), v); yes {
				out = append(out, Advisory{ID: id, Module: m, Fixed: written(m, fixed), Summary: firstLine(e.Summary), Published: e.Published.UTC()})
			}
		}
	}
	slices.SortFunc(out, func(a, b Advisory) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Module.Path, b.Module.Path))
	})
	return slices.Compact(out), nil
}

func (db *DB) away(err error) error {
	return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("the advisories for Go modules cannot be read from %s: %v", db.base.Redacted(), err),
		Hint: "m3od --go-vuln-db names another database, or off", Err: err}
}

func (db *DB) read(ctx context.Context, name string, limit int64) ([]byte, error) {
	if db.base.Scheme == "file" {
		f, err := os.Open(filepath.Join(db.base.Path, filepath.FromSlash(name)))
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // only read
		return limited(f, name, limit)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, db.base.JoinPath(name).String(), nil)
	if err != nil {
		return nil, errors.New("the address is malformed")
	}
	req.Header.Set("User-Agent", userAgent)
	res, err := db.http.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err // without the address, which may hold a password
		}
		return nil, err
	}
	defer res.Body.Close() //nolint:errcheck // only read
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", name, res.Status)
	}
	return limited(res.Body, name, limit)
}

func limited(r io.Reader, name string, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is larger than %d MB", name, limit>>20)
	}
	return b, err
}

// vulns are the advisories that one module ever had.
type vulns []struct {
	ID    string `json:"id"`
	Fixed string `json:"fixed"` // the newest version that mends one, "" when there is none
}

// mayAffect is the ids of those whose entry has to be read to know about v.
func (vs vulns) mayAffect(v string) []string {
	var out []string
	for _, x := range vs {
		if x.Fixed == "" || semver.Compare(v, "v"+x.Fixed) < 0 {
			out = append(out, x.ID)
		}
	}
	return out
}

func parseIndex(b []byte) (map[string]vulns, error) {
	var list []struct {
		Path  string `json:"path"`
		Vulns vulns  `json:"vulns"`
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("index/modules.json: %w", err)
	}
	out := make(map[string]vulns, len(list))
	for _, m := range list {
		for _, v := range m.Vulns {
			if !idLike(v.ID) {
				return nil, fmt.Errorf("index/modules.json: %.40q is no id of an advisory", v.ID)
			}
		}
		out[m.Path] = append(out[m.Path], m.Vulns...)
	}
	return out, nil
}

// idLike keeps what is no id from becoming part of a path.
func idLike(s string) bool {
	return s != "" && len(s) <= 64 && s[0] != '-' && strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// An entry is one advisory, as far as it is used.
type entry struct {
	Summary   string     `json:"summary"`
	Published time.Time  `json:"published"`
	Withdrawn *time.Time `json:"withdrawn"`
	Affected  []struct {
		Package struct {
			Name      string `json:"name"`
			Ecosystem string `json:"ecosystem"`
		} `json:"package"`
		Ranges []struct {
			Type   string  `json:"type"`
			Events []event `json:"events"`
		} `json:"ranges"`
	} `json:"affected"`
}

type event struct {
	Introduced string `json:"introduced"`
	Fixed      string `json:"fixed"`
}

// at is the version at which the event is, "" for the beginning of all.
func (e event) at() string {
	if s := cmp.Or(e.Introduced, e.Fixed); s != "0" && s != "" {
		return "v" + s
	}
	return ""
}

func parseEntry(b []byte) (entry, error) {
	var e entry
	if err := json.Unmarshal(b, &e); err != nil {
		return e, err
	}
	for _, a := range e.Affected {
		for _, r := range a.Ranges {
			for _, ev := range r.Events {
				if v := ev.at(); r.Type == "SEMVER" && v != "" && !semver.IsValid(v) {
					return e, fmt.Errorf("%.40q is no version", v)
				}
			}
		}
	}
	return e, nil
}

// affects reports whether the module path has it at version v, and where it is
// mended next.
func (e entry) affects(path, v string) (fixed string, yes bool) {
	if e.Withdrawn != nil {
		return "", false
	}
	for _, a := range e.Affected {
		if a.Package.Ecosystem != "Go" || a.Package.Name != path {
			continue
		}
		for _, r := range a.Ranges {
			if r.Type != "SEMVER" {
				continue
			}
			events := slices.Clone(r.Events)
			slices.SortStableFunc(events, func(a, b event) int { return semver.Compare(a.at(), b.at()) })
			in := false
			for _, ev := range events {
				if semver.Compare(ev.at(), v) > 0 {
					if in && ev.Fixed != "" {
						return ev.at(), true
					}
					continue
				}
				in = ev.Introduced != ""
			}
			if in {
				return "", true
			}
		}
	}
	return "", false
}

func nameIn(m Module) string {
	if m.Path == "std" {
		return stdlib
	}
	return m.Path
}

// canonical is the version of a module as semver compares it, "" where it has none.
func canonical(m Module) string {
	v := m.Version
	if m.Path == "std" {
		// go1.26rc1 is 1.26.0-rc.1 in the database.
		if !goversion.IsValid(v) {
			return ""
		}
		v = strings.TrimPrefix(v, "go")
		for _, pre := range []string{"rc", "beta"} {
			if base, n, ok := strings.Cut(v, pre); ok {
				v = base + ".0-" + pre + "." + n
			}
		}
		v = "v" + v
	}
	return semver.Canonical(v)
}

// written is a version as the module's own are written.
func written(m Module, v string) string {
	if m.Path == "std" && v != "" {
		return "go" + strings.TrimPrefix(v, "v")
	}
	return v
}

func firstLine(s string) string {
	l, _, _ := strings.Cut(s, "\n")
	return strings.ToValidUTF8(l[:min(len(l), 200)], "")
}

// Modules reads the Go modules of a bill of materials in CycloneDX's JSON.
func Modules(sbom []byte) ([]Module, error) {
	var doc struct {
		Components []struct {
			Type    string `json:"type"`
			Name    string `json:"name"`
			Version string `json:"version"`
		} `json:"components"`
	}
	if err := json.Unmarshal(sbom, &doc); err != nil {
		return nil, fmt.Errorf("read bill of materials: %w", err)
	}
	var out []Module
	for _, c := range doc.Components {
		if c.Type == "library" {
			out = append(out, Module{c.Name, c.Version})
		}
	}
	return out, nil
}
