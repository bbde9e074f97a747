package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/m3o/m3o/daemon"
)

// The marks in docs/operating.md between which the table stands.
const (
	settingsBegin = "<!-- settings: made by go run ./tools/docgen -->\n"
	settingsEnd   = "<!-- /settings -->\n"
)

// settings puts the table of m3od's settings between the marks of old.
func settings(_ context.Context, _ string, old []byte) ([]byte, error) {
	before, rest, ok := bytes.Cut(old, []byte(settingsBegin))
	_, after, ok2 := bytes.Cut(rest, []byte(settingsEnd))
	if !ok || !ok2 {
		return nil, fmt.Errorf("it lacks the line %q or %q", strings.TrimSpace(settingsBegin), strings.TrimSpace(settingsEnd))
	}
	table, err := settingsTable()
	if err != nil {
		return nil, err
	}
	return bytes.Join([][]byte{before, []byte(settingsBegin), []byte(table), []byte(settingsEnd), after}, nil), nil
}

// settingsTable asks the daemon's own parser which settings there are and what
// they are when nothing is set.
func settingsTable() (string, error) {
	// A configuration file of this machine must not be taken for the defaults.
	dir, err := os.MkdirTemp("", "docgen-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // an empty file in a temporary directory
	empty := filepath.Join(dir, "m3od.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		return "", err
	}
	none := func(string) string { return "" }
	local, err := daemon.ParseConfig([]string{"--config", empty}, none, nil)
	if err != nil {
		return "", err
	}
	remote, err := daemon.ParseConfig([]string{"--config", empty, "--domain", "example.com"}, none, nil)
	if err != nil {
		return "", err
	}
	var flags []*flag.Flag
	_, err = daemon.ParseConfig([]string{"--help"}, none, func(fs *flag.FlagSet) {
		fs.VisitAll(func(f *flag.Flag) { flags = append(flags, f) })
	})
	if !errors.Is(err, flag.ErrHelp) {
		return "", fmt.Errorf("ask for the flags: %w", err)
	}
	var b strings.Builder
	b.WriteString("\n| flag | variable | key | default | meaning |\n| --- | --- | --- | --- | --- |\n")
	for _, f := range flags {
		variable, key := "`M3O_"+strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))+"`", "`"+f.Name+"`"
		if f.Name == "config" { // says where the others are read from
			fmt.Fprintf(&b, "| `--config` | – | – | `%s`, when it exists | the configuration file |\n", daemon.DefaultConfigFile)
			continue
		}
		here, err := value(local, f.Name)
		if err != nil {
			return "", err
		}
		there, err := value(remote, f.Name)
		if err != nil {
			return "", err
		}
		def := "`" + here + "`"
		switch {
		case f.Name == "bin":
			def = "where `m3od` is" // of this program, it is a temporary directory
		case here == "":
			def = "none"
		case f.Name != "domain" && here != there:
			def = fmt.Sprintf("`%s`; `%s` with domain localhost", there, here)
		}
		fmt.Fprintf(&b, "| `--%s` | %s | %s | %s | %s |\n", f.Name, variable, key, def, escape(f.Usage))
	}
	b.WriteString("\n")
	return b.String(), nil
}

// value is the setting called name of c. Fields are called like their flags
// but for hyphens; the end of a long one may be left out.
func value(c daemon.Config, name string) (string, error) {
	v := reflect.ValueOf(c)
	flat := strings.ReplaceAll(name, "-", "")
	best := -1
	for i := range v.NumField() {
		field := strings.ToLower(v.Type().Field(i).Name)
		if strings.HasPrefix(flat, field) && (best < 0 || len(field) > len(v.Type().Field(best).Name)) {
			best = i
		}
	}
	if best < 0 {
		return "", fmt.Errorf("no field of daemon.Config is called like --%s", name)
	}
	return fmt.Sprint(v.Field(best).Interface()), nil
}

// escape keeps a text one cell of a table; <app> would be an HTML element.
func escape(s string) string {
	return strings.NewReplacer("|", "\\|", "<", "\\<", "\n", " ").Replace(s)
}
