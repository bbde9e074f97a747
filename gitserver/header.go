package gitserver

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/m3o/m3o"
)

// An update is one ref change a client asks for.
type update struct {
	old, new string // commit or other object, 40 hex digits; "" when the ref does not exist
	ref      string // as sent: not checked yet
}

func (u update) String() string { return orZero(u.old) + " " + orZero(u.new) + " " + u.ref }

const zeroID = "0000000000000000000000000000000000000000"

func orZero(id string) string {
	if id == "" {
		return zeroID
	}
	return id
}

// A header is what a client says before its pack. It is read on its way to
// git, because what the hook is told is not enough: a ref name with a newline
// in it could forge the hook's lines, and the refs that git is about to refuse
// look like the others.
type header struct {
	updates []update
	options []string // push options
	atomic  bool
	empty   bool // the client hung up without a word
}

// maxHeader bounds a header in bytes, and so what git keeps of it in memory.
const maxHeader = 4 << 20

var errHeader = m3o.Errorf(m3o.Invalid, "the push request is malformed")

// readHeader reads a header from r packet by packet, writing each to w after
// it was found sound (gitprotocol-pack(5), "Reference Update Request"). An
// error means that git must not get the rest.
func readHeader(r io.Reader, w io.Writer) (header, error) {
	var h header
	total, first := 0, true
	caps := ""
	lines := func(each func(line string) error) error {
		for {
			line, flush, raw, err := readPacket(r)
			if err != nil {
				return err
			}
			if total += len(raw); total > maxHeader {
				return m3o.Errorf(m3o.Invalid, "the push names too many refs")
			}
			if !flush {
				if err := each(line); err != nil {
					return err
				}
			}
			// git's end of the pipe may be closed; its exit tells why.
			if _, err := w.Write(raw); err != nil {
				return fmt.Errorf("pass request to git: %w", err)
			}
			first = false
			if flush {
				return nil
			}
		}
	}
	err := lines(func(line string) error {
		if id, ok := strings.CutPrefix(line, "shallow "); ok {
			if !isID(strings.TrimSuffix(id, "\n")) {
				return errHeader
			}
			return nil
		}
		cmd, c, has := strings.Cut(line, "\x00")
		if has {
			caps += " " + strings.TrimSuffix(c, "\n")
		} else {
			cmd = strings.TrimSuffix(cmd, "\n")
		}
		if strings.Contains(caps, " object-format=sha256") {
			return errSHA256
		}
		if cmd == "push-cert" {
			return &m3o.Error{Kind: m3o.Invalid, Msg: "signed pushes are not supported", Hint: "git push --no-signed"}
		}
		f := strings.SplitN(cmd, " ", 3)
		if len(f) != 3 || !isID(f[0]) || !isID(f[1]) || f[2] == "" {
			return errHeader
		}
		u := update{old: f[0], new: f[1], ref: f[2]}
		if u.old == zeroID {
			u.old = ""
		}
		if u.new == zeroID {
			u.new = ""
		}
		h.updates = append(h.updates, u)
		return nil
	})
	if errors.Is(err, io.EOF) && first {
		h.empty = true
	}
	if err != nil {
		return h, err
	}
	for c := range strings.FieldsSeq(caps) {
		switch c {
		case "atomic":
			h.atomic = true
		case "push-options":
			// git reads options only after at least one command.
			if len(h.updates) > 0 {
				err := lines(func(line string) error {
					h.options = append(h.options, strings.TrimSuffix(line, "\n"))
					return nil
				})
				return h, err
			}
		}
	}
	return h, nil
}

var errSHA256 = &m3o.Error{Kind: m3o.Invalid, Msg: "this repository names its objects by SHA-256, m3o by SHA-1",
	Hint: "push a copy made without --object-format=sha256"}

// readPacket reads one packet line. raw is its bytes, length included.
func readPacket(r io.Reader) (line string, flush bool, raw []byte, err error) {
	raw = make([]byte, 4, 128)
	if n, err := io.ReadFull(r, raw); err != nil {
		if n > 0 {
			err = io.ErrUnexpectedEOF
		}
		return "", false, nil, err
	}
	n, ok := pktLen(raw)
	switch {
	case !ok, n > 0 && n <= 4: // 1 and 2 belong to protocol v2, 4 is empty
		return "", false, nil, errHeader
	case n == 0:
		return "", true, raw, nil
	}
	raw = append(raw, make([]byte, n-4)...)
	if _, err := io.ReadFull(r, raw[4:]); err != nil {
		return "", false, nil, io.ErrUnexpectedEOF
	}
	return string(raw[4:]), false, raw, nil
}

// pktLen is the length four hex digits stand for, at most 65520.
func pktLen(b []byte) (int, bool) {
	var v [2]byte
	if _, err := hex.Decode(v[:], b); err != nil {
		return 0, false
	}
	n := int(v[0])<<8 | int(v[1])
	return n, n <= 65520
}

func isID(s string) bool {
	if len(s) != 40 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if b := s[i]; (b < '0' || b > '9') && (b < 'a' || b > 'f') {
			return false
		}
	}
	return true
}
