package m3o

import (
	"fmt"
	"hash/fnv"
	"log/slog"
	"slices"
	"strings"
)

// reservedNames are the app names the platform keeps for its own hosts.
var reservedNames = []string{"api", "www", "m3o", "git", "admin", "internal", "hooks"}

// CheckAppName reports why name cannot be an app's name: it becomes a host
// name label, a directory and a git remote, so it is 1 to 40 of a-z, 0-9 and
// single hyphens, begins with a letter and does not end with a hyphen. Two
// hyphens in a row are kept for v12--app and pr-7--app hosts.
func CheckAppName(name string) error {
	bad := func(why string) error {
		return &Error{Kind: Invalid, Msg: fmt.Sprintf("app name %q %s", name, why),
			Hint: "use 1 to 40 of a-z, 0-9 and single hyphens, beginning with a letter"}
	}
	switch {
	case name == "":
		return bad("is empty")
	case len(name) > 40:
		return bad("is longer than 40 characters")
	case name[0] < 'a' || name[0] > 'z':
		return bad("does not begin with a letter a-z")
	case strings.HasSuffix(name, "-"):
		return bad("ends with a hyphen")
	case strings.Contains(name, "--"):
		return bad("has two hyphens in a row")
	case slices.Contains(reservedNames, name):
		return bad("is reserved for the platform")
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return bad(fmt.Sprintf("has the character %q", c))
		}
	}
	return nil
}

// maxName is what a label of a host name can hold.
const maxName = 63

// CheckName reports why nothing that runs can be called name: neither an app
// (CheckAppName) nor a preview of one, such as pr-7--hello, whose names only
// the platform makes (PreviewName).
func CheckName(name string) error {
	label, app, ok := strings.Cut(name, "--")
	if !ok {
		return CheckAppName(name)
	}
	if err := CheckAppName(app); err != nil {
		return err
	}
	if len(name) > maxName || label == "" || label[0] == '-' || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return &Error{Kind: Invalid, Msg: fmt.Sprintf("%q is no name of a preview", name), Hint: "m3o previews lists them"}
	}
	return nil
}

// ParentOf is the app that name is a preview of, or name itself where it is
// no preview's.
func ParentOf(name string) string {
	if _, app, ok := strings.Cut(name, "--"); ok {
		return app
	}
	return name
}

// PreviewName is the name of the preview of app for a pull request ("pr-7") or
// a branch: a host name label at most 63 long, different for different labels.
func PreviewName(label, app string) string {
	var b strings.Builder
	for _, c := range strings.ToLower(label) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			c = '-'
		}
		if c == '-' && (b.Len() == 0 || strings.HasSuffix(b.String(), "-")) {
			continue
		}
		b.WriteRune(c)
	}
	clean := strings.TrimSuffix(b.String(), "-")
	room := maxName - len("--") - len(app)
	if clean != label || len(clean) > room {
		// Not what was asked for: a hash tells it from another that looks the same.
		h := fnv.New32a()
		_, _ = h.Write([]byte(label))
		hash := fmt.Sprintf("%08x", h.Sum32())
		clean = strings.Trim(clean[:min(len(clean), room-len(hash)-1)]+"-"+hash, "-")
	}
	return clean + "--" + app
}

// A Secret is text that must not reach a log, an error or a terminal: it
// prints as dots whatever the verb. Reveal gives the text.
type Secret string

const hidden = "•••"

// Reveal is the text itself. Call it only where the secret is put to use.
func (s Secret) Reveal() string { return string(s) }

// String hides the text.
func (Secret) String() string { return hidden }

// GoString hides the text from %#v.
func (Secret) GoString() string { return hidden }

// Format hides the text from every fmt verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(hidden)) }

// LogValue hides the text from log/slog.
func (Secret) LogValue() slog.Value { return slog.StringValue(hidden) }

// MarshalText hides the text from JSON and YAML. What must be stored is
// sealed first, by package config.
func (Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }
