package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o/internal/atomicfile"
)

// settings is what login stores: $XDG_CONFIG_HOME/m3o/config.json, readable
// by its owner only because it holds tokens.
type settings struct {
	Current string             `json:"current,omitempty"` // a key of Servers
	Servers map[string]*server `json:"servers,omitempty"` // by URL
}

// A server is an installation that somebody logged in to.
type server struct {
	User    string    `json:"user,omitempty"`
	Token   string    `json:"token,omitempty"` // "" once logged out
	Expires time.Time `json:"expires,omitzero"`
	CA      string    `json:"ca,omitempty"`       // PEM; "" for certificates every computer knows
	GitHost string    `json:"git_host,omitempty"` // host:port of its git remotes
}

// maxSettings bounds the stored file: hundreds of servers, and no accident.
const maxSettings = 1 << 20

// parseSettings reads the stored file. What it accepts, it writes back the same.
func parseSettings(data []byte) (settings, error) {
	s := settings{Servers: map[string]*server{}}
	if len(data) > maxSettings {
		return s, errors.New("it is too large")
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return s, nil
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return s, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return s, errors.New("something follows its end")
	}
	if s.Servers == nil {
		s.Servers = map[string]*server{}
	}
	for u, srv := range s.Servers {
		if srv == nil {
			return s, fmt.Errorf("server %q is null", u)
		}
		if p, err := parseServerURL(u); err != nil || p.String() != u {
			return s, fmt.Errorf("%q is no server URL", u)
		}
	}
	if s.Current != "" && s.Servers[s.Current] == nil {
		return s, fmt.Errorf("the current server %q is not among the servers", s.Current)
	}
	return s, nil
}

// settingsPath is where the file is, whether it exists or not.
func (s *system) settingsPath() (string, error) {
	dir := s.env("XDG_CONFIG_HOME")
	switch {
	case dir != "" && filepath.IsAbs(dir): // the specification says to ignore relative ones
	case goruntime.GOOS == "windows" && s.env("AppData") != "":
		dir = s.env("AppData")
	default:
		home, err := s.home()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "m3o", "config.json"), nil
}

func (s *system) home() (string, error) {
	key := "HOME"
	if goruntime.GOOS == "windows" {
		key = "USERPROFILE"
	}
	if h := s.env(key); h != "" {
		return h, nil
	}
	return "", fail("there is no home directory: "+key+" is not set", "set "+key+", or M3O_URL and M3O_TOKEN")
}

func (s *system) loadSettings() (settings, error) {
	path, err := s.settingsPath()
	if err != nil {
		return settings{}, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return settings{Servers: map[string]*server{}}, nil
	}
	if err != nil {
		return settings{}, err
	}
	defer f.Close() //nolint:errcheck // only read
	if fi, err := f.Stat(); err == nil && goruntime.GOOS != "windows" && fi.Mode().Perm()&0o077 != 0 {
		s.say("m3o: warning: others on this computer can read %s; chmod 600 %s", path, quote(path))
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSettings+1))
	if err != nil {
		return settings{}, err
	}
	st, err := parseSettings(data)
	if err != nil {
		return settings{}, fail(fmt.Sprintf("cannot read %s: %v", path, err), "repair it, or remove it and log in again")
	}
	return st, nil
}

func (s *system) saveSettings(st settings) error {
	path, err := s.settingsPath()
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return atomicfile.Write(path, append(data, '\n'), 0o600)
}

// parseServerURL reads the URL of an API as people type it: https:// may be
// left out. Plain http is for loopback only: a token in the clear is no token.
func parseServerURL(raw string) (*url.URL, error) {
	bad := func(why string) (*url.URL, error) {
		return nil, misuse(fmt.Sprintf("%s is no server URL: %s", quoted(raw), why), "the API is at https://api.<domain>")
	}
	full := raw
	if !strings.Contains(raw, "://") {
		full = "https://" + raw
	}
	u, err := url.Parse(full)
	if err != nil {
		return bad("it does not parse")
	}
	host := strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return bad("it begins with neither https:// nor http://")
	case host == "":
		return bad("it has no host")
	case strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r == '%' || r > '~' }):
		return bad("its host has odd characters")
	case u.User != nil:
		return bad("it carries a user name")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return bad("it has more than a host and a port")
	case u.Scheme == "http" && !loopback(host):
		return bad("it is not encrypted, and the host is not this computer")
	}
	port := u.Port()
	if strings.HasSuffix(u.Host, ":") || port == "443" && u.Scheme == "https" || port == "80" && u.Scheme == "http" {
		port = ""
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if port != "" {
		host += ":" + port
	}
	return &url.URL{Scheme: u.Scheme, Host: host}, nil
}

// loopback says whether a host name means this computer by its form alone.
func loopback(host string) bool {
	if ip := net.ParseIP(host); ip != nil {
		return ip.IsLoopback()
	}
	return isLocalhost(host)
}

// isLocalhost is for localhost and the names below it, which RFC 6761 gives
// to the computer itself.
func isLocalhost(host string) bool {
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// pick finds a stored server by URL, host or the beginning of either.
func (st settings) pick(word string) (string, error) {
	var hits []string
	for u := range st.Servers {
		p, _ := url.Parse(u)
		if u == word || p.Host == word {
			return u, nil
		}
		if strings.HasPrefix(u, word) || strings.HasPrefix(p.Host, word) || strings.HasPrefix(p.Host, "api."+word) {
			hits = append(hits, u)
		}
	}
	slices.Sort(hits)
	switch len(hits) {
	case 1:
		return hits[0], nil
	case 0:
		return "", fail("no stored server matches "+quoted(word), "m3o env lists them; m3o login adds one")
	}
	return "", misuse(fmt.Sprintf("%s matches %s", quoted(word), strings.Join(hits, " and ")), "write more of it")
}
