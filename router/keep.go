package router

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
)

// The last good table is on disk as a file, written whole and atomically, and
// beside it a journal of the changes since. The journal is not synced: it has
// to survive the router, and after a power cut the daemon gives the table
// again anyhow. A torn last line is dropped.

// file is the JSON form of a Table, on the wire and on disk.
type file struct {
	Version int    `json:"version"`
	Seq     uint64 `json:"seq,omitempty"` // on disk: changes up to this one are in it
	Table
}

func encodeTable(t Table, seq uint64) ([]byte, error) {
	b, err := json.Marshal(file{tableVersion, seq, t})
	if err != nil {
		return nil, fmt.Errorf("encode table: %w", err)
	}
	return b, nil
}

// decodeTable reads what encodeTable wrote and nothing else: unknown keys,
// another version, trailing bytes and whatever Validate refuses are errors.
func decodeTable(b []byte) (Table, uint64, error) {
	if len(b) > maxTableBytes {
		return Table{}, 0, m3o.Errorf(m3o.Invalid, "table of %d bytes is larger than %d", len(b), maxTableBytes)
	}
	var f file
	if err := strict(b, &f); err != nil {
		return Table{}, 0, m3o.Errorf(m3o.Invalid, "decode table: %w", err)
	}
	if f.Version != tableVersion {
		return Table{}, 0, m3o.Errorf(m3o.Invalid, "table has version %d, this router reads %d", f.Version, tableVersion)
	}
	return f.Table, f.Seq, f.Table.Validate()
}

// decodeChange is decodeTable for a Change.
func decodeChange(b []byte) (Change, error) {
	var c Change
	if err := strict(b, &c); err != nil {
		return c, m3o.Errorf(m3o.Invalid, "decode change: %w", err)
	}
	return c, c.Validate()
}

func strict(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more follows")
	}
	return nil
}

// entry is one line of the journal.
type entry struct {
	Seq uint64 `json:"seq"`
	Change
}

// journal appends changes beside the table's file. Router.mu guards it.
type journal struct {
	f    *os.File
	size int64
}

func journalPath(state string) string { return state + ".log" }

// add writes one change that makes the table seq.
func (j *journal) add(state string, seq uint64, c Change) error {
	b, err := json.Marshal(entry{seq, c})
	if err != nil {
		return fmt.Errorf("encode change: %w", err)
	}
	if j.f == nil {
		if j.f, err = os.OpenFile(journalPath(state), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
			return fmt.Errorf("keep change: %w", err)
		}
		fi, err := j.f.Stat()
		if err != nil {
			return fmt.Errorf("keep change: %w", err)
		}
		j.size = fi.Size()
	}
	n, err := j.f.Write(append(b, '\n'))
	if err != nil {
		// Half a line must not spoil the next one.
		err = errors.Join(err, j.f.Truncate(j.size))
		return fmt.Errorf("keep change: %w", err)
	}
	j.size += int64(n)
	return nil
}

// clear drops what the table's file has by now.
func (j *journal) clear(state string) error {
	j.close()
	if err := os.Remove(journalPath(state)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clear journal: %w", err)
	}
	return nil
}

func (j *journal) close() {
	if j.f != nil {
		_ = j.f.Close() // nothing of it is buffered here
		j.f, j.size = nil, 0
	}
}

// load gives the last good table and its number. fs.ErrNotExist when there is
// none yet; whatever of the journal cannot be read or does not follow is left
// out.
func load(state string) (Table, uint64, error) {
	b, err := os.ReadFile(state)
	if err != nil {
		return Table{}, 0, err
	}
	t, seq, err := decodeTable(b)
	if err != nil {
		return Table{}, 0, err
	}
	f, err := os.Open(journalPath(state))
	if err != nil {
		return t, seq, nil // none, or as good as none
	}
	defer f.Close() //nolint:errcheck // read only
	rows := make(map[string]Host, len(t.Hosts))
	for _, h := range t.Hosts {
		rows[h.Name] = h
	}
	r := bufio.NewReaderSize(f, 1<<20)
	for {
		line, err := r.ReadBytes('\n')
		var e entry
		if err != nil || strict(line, &e) != nil || e.Change.Validate() != nil || e.Seq > seq+1 {
			break
		}
		if e.Seq <= seq {
			continue // it is in the file already
		}
		seq = e.Seq
		for _, n := range e.Remove {
			delete(rows, n)
		}
		for _, h := range e.Set {
			rows[h.Name] = h
		}
	}
	t.Hosts = t.Hosts[:0]
	for _, h := range rows {
		t.Hosts = append(t.Hosts, h)
	}
	return t, seq, nil
}

// compactAt is the journal's size from which the table is written anew.
const compactAt = 4 << 20

// compact writes the table anew when the journal has grown. Changes that come
// meanwhile stay in the journal, which is then cleared another time.
func (rt *Router) compact() {
	rt.mu.Lock()
	l, size := rt.live.Load(), rt.journal.size
	rt.mu.Unlock()
	if l == nil || size < compactAt || rt.retiring.Load() {
		return
	}
	b, err := encodeTable(l.tableOf(), l.seq)
	if err == nil {
		rt.keep.Lock()
		defer rt.keep.Unlock()
		if rt.kept >= l.seq {
			return // a whole table came meanwhile
		}
		err = atomicfile.Write(rt.cfg.State, b, 0o600)
	}
	if err == nil {
		rt.kept = l.seq
		rt.mu.Lock()
		if rt.live.Load() == l {
			err = rt.journal.clear(rt.cfg.State)
		}
		rt.mu.Unlock()
	}
	if err != nil {
		rt.log.Warn("write the table anew", "err", err)
	}
}
