package runtime

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The shape of the log files, which m3o-shim writes too (it imports nothing of
// the project; a test of runtime/oci holds both together): a line is
// "<RFC 3339 time with nanoseconds> o|e <text>\n", text is at most MaxLine
// bytes and longer lines are split; at LogBytes the file is renamed to .1,
// .1 to .2, and what was .2 is gone.
const (
	MaxLine  = 16 << 10
	LogBytes = 10 << 20
	logFiles = 3
	// keptLogs is how many instances of an app have their logs kept after
	// they are gone.
	keptLogs = 20
	followed = 200 * time.Millisecond // how often a follower looks for more
)

// Logs are the log files of a driver's instances, one directory per app and
// one per process type and release in it.
type Logs struct{ Dir string }

// Path makes the directory of an instance's log and returns the log's path.
func (l Logs) Path(r Ref, instance string) (string, error) {
	d := filepath.Join(l.Dir, r.App, fmt.Sprintf("%s.v%d", r.Process, r.Release))
	if err := os.MkdirAll(d, 0o700); err != nil {
		return "", fmt.Errorf("make log directory: %w", err)
	}
	return filepath.Join(d, instance+".log"), nil
}

type logFile struct {
	Ref
	instance, path string
	changed        time.Time
}

// files lists the newest file of each instance's log that r selects.
func (l Logs) files(r Ref) ([]logFile, error) {
	apps := []string{r.App}
	if r.App == "" {
		es, err := os.ReadDir(l.Dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list logs: %w", err)
		}
		apps = nil
		for _, e := range es {
			apps = append(apps, e.Name())
		}
	}
	var out []logFile
	for _, app := range apps {
		if !word.MatchString(app) {
			continue
		}
		paths, err := logPaths(filepath.Join(l.Dir, app))
		if err != nil {
			return nil, fmt.Errorf("list logs: %w", err)
		}
		for _, p := range paths {
			dir := filepath.Base(filepath.Dir(p))
			i := strings.LastIndex(dir, ".v")
			if i < 0 {
				continue
			}
			n, err := strconv.Atoi(dir[i+2:])
			if err != nil || r.Release != 0 && r.Release != n || r.Process != "" && r.Process != dir[:i] {
				continue
			}
			fi, err := os.Stat(p)
			if err != nil {
				continue // removed since
			}
			out = append(out, logFile{Ref{app, dir[:i], n}, strings.TrimSuffix(filepath.Base(p), ".log"), p, fi.ModTime()})
		}
	}
	return out, nil
}

func logPaths(app string) (paths []string, err error) {
	dirs, err := os.ReadDir(app)
	for _, d := range dirs {
		es, err := os.ReadDir(filepath.Join(app, d.Name()))
		if err != nil {
			continue // removed since, or not ours
		}
		for _, e := range es {
			if strings.HasSuffix(e.Name(), ".log") {
				paths = append(paths, filepath.Join(app, d.Name(), e.Name()))
			}
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return paths, err
}

// A Retention bounds the logs that are kept of an app. Zero fields bound nothing.
type Retention struct {
	Age   time.Duration // what was last written to longer ago goes, save what a running instance still writes to
	Bytes int64         // of the logs of instances that are gone
}

// Trim removes what keep has no room for: logs of instances that are gone, the
// longest silent first, of which no app keeps more than a few either, and
// files that were rotated away too long ago. live says which instances are not
// gone.
func (l Logs) Trim(keep Retention, live func(instance string) bool) error {
	all, err := l.files(Ref{})
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b logFile) int { return b.changed.Compare(a.changed) })
	type kept struct {
		logs  int
		bytes int64
	}
	apps := map[string]*kept{}
	for _, f := range all {
		if live(f.instance) {
			if err := f.trimRotated(keep.Age); err != nil {
				return err
			}
			continue
		}
		k := apps[f.App]
		if k == nil {
			k = &kept{}
			apps[f.App] = k
		}
		k.logs++
		k.bytes += f.bytes()
		if k.logs <= keptLogs && (keep.Bytes <= 0 || k.bytes <= keep.Bytes) && !keep.tooOld(f.changed) {
			continue
		}
		for i := range logFiles {
			if err := removeLog(rotated(f.path, i)); err != nil {
				return err
			}
		}
		_ = os.Remove(filepath.Dir(f.path)) // succeeds for the last one in it
	}
	return nil
}

func (k Retention) tooOld(changed time.Time) bool { return k.Age > 0 && time.Since(changed) > k.Age }

func removeLog(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old log: %w", err)
	}
	return nil
}

// trimRotated removes the rotated files of a log in use that are too old.
func (f logFile) trimRotated(age time.Duration) error {
	for i := 1; i < logFiles; i++ {
		fi, err := os.Stat(rotated(f.path, i))
		if err != nil || !(Retention{Age: age}).tooOld(fi.ModTime()) {
			continue
		}
		if err := removeLog(rotated(f.path, i)); err != nil {
			return err
		}
	}
	return nil
}

// bytes is the size of a log, its rotated files included.
func (f logFile) bytes() (n int64) {
	for i := range logFiles {
		if fi, err := os.Stat(rotated(f.path, i)); err == nil {
			n += fi.Size()
		}
	}
	return n
}

func rotated(path string, i int) string {
	if i == 0 {
		return path
	}
	return path + "." + strconv.Itoa(i)
}

// Read yields the last lines of the instances r selects, in the order of their
// times, and then, if follow, lines as they are written until ctx ends. See
// Driver.Logs.
func (l Logs) Read(ctx context.Context, r Ref, lines int, follow bool) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		tails := map[string]*tail{}
		defer func() {
			for _, t := range tails {
				t.close()
			}
		}()
		for first := true; ; first = false {
			files, err := l.files(r)
			if err != nil {
				yield(Line{}, err)
				return
			}
			var got []Line
			seen := map[string]bool{}
			for _, f := range files {
				seen[f.path] = true
				t := tails[f.path]
				if t == nil {
					t = &tail{logFile: f}
					tails[f.path] = t
					if first {
						t.seek(lines)
					}
				}
				got = t.read(got)
			}
			for p, t := range tails {
				if !seen[p] {
					t.close()
					delete(tails, p)
				}
			}
			slices.SortStableFunc(got, func(a, b Line) int { return a.Time.Compare(b.Time) })
			if first && len(got) > lines {
				got = got[len(got)-max(lines, 0):]
			}
			for _, ln := range got {
				if !yield(ln, nil) {
					return
				}
			}
			if !follow {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(followed):
			}
		}
	}
}

// A tail reads one instance's log, across rotations.
type tail struct {
	logFile
	f    *os.File
	r    *bufio.Reader
	part []byte // the beginning of a line whose end is not written yet
}

func (t *tail) close() {
	if t.f != nil {
		_ = t.f.Close()
		t.f = nil
	}
}

func (t *tail) open(path string, at int64) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	if at > 0 {
		if _, err := f.Seek(at, io.SeekStart); err != nil {
			_ = f.Close()
			return false
		}
	}
	t.close()
	t.f, t.r, t.part = f, bufio.NewReaderSize(f, 64<<10), nil
	return true
}

// seek goes to n lines before the end, to the oldest line if there are fewer.
func (t *tail) seek(n int) {
	for i := range logFiles {
		p := rotated(t.path, i)
		at, found, err := lastLines(p, n)
		if err != nil {
			return // the oldest file has been opened already, or there is none
		}
		t.open(p, at)
		if n -= found; n <= 0 {
			return
		}
	}
}

// lastLines is where the last n lines of a file begin, and how many there are.
func lastLines(path string, n int) (at int64, found int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close() //nolint:errcheck // read only
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || n <= 0 {
		return end, 0, err
	}
	buf := make([]byte, 64<<10)
	for pos := end; pos > 0; {
		k := min(int64(len(buf)), pos)
		pos -= k
		if _, err := f.ReadAt(buf[:k], pos); err != nil {
			return 0, 0, err
		}
		for i := k - 1; i >= 0; i-- {
			if buf[i] == '\n' && pos+i+1 < end {
				if found++; found == n {
					return pos + i + 1, found, nil
				}
			}
		}
	}
	if end > 0 {
		found++
	}
	return 0, found, nil
}

// read appends every whole line written since the last call.
func (t *tail) read(out []Line) []Line {
	if t.f == nil && !t.openOldest() {
		return out
	}
	for {
		out = t.drain(out)
		if !t.next() {
			return out
		}
	}
}

func (t *tail) drain(out []Line) []Line {
	for {
		b, err := t.r.ReadSlice('\n')
		if len(t.part)+len(b) > 2*MaxLine { // not a line of ours
			t.part, b = nil, nil
		}
		if err != nil {
			t.part = append(t.part, b...)
			if errors.Is(err, bufio.ErrBufferFull) {
				continue
			}
			return out
		}
		if len(t.part) > 0 {
			b = append(t.part, b...)
			t.part = nil
		}
		if ln, ok := parseLine(b); ok {
			ln.Ref, ln.Instance = t.Ref, t.instance
			out = append(out, ln)
		}
	}
}

func (t *tail) openOldest() bool {
	for i := logFiles - 1; i >= 0; i-- {
		if t.open(rotated(t.path, i), 0) {
			return true
		}
	}
	return false
}

// next goes on to the file after the one read so far, if that was rotated.
func (t *tail) next() bool {
	at, err := t.f.Stat()
	if err != nil {
		return false
	}
	for i := range logFiles {
		fi, err := os.Stat(rotated(t.path, i))
		if err == nil && os.SameFile(at, fi) {
			return i > 0 && t.open(rotated(t.path, i-1), 0)
		}
	}
	// Rotated away altogether: the lines between are gone, go on with the
	// oldest there is, unless the log was removed.
	if _, err := os.Stat(t.path); err != nil {
		return false
	}
	return t.openOldest()
}

// parseLine reads one line of a log file; !ok means it is not one.
func parseLine(b []byte) (ln Line, ok bool) {
	stamp, rest, found := bytes.Cut(bytes.TrimSuffix(b, []byte("\n")), []byte(" "))
	if !found || len(rest) < 2 || rest[1] != ' ' {
		return Line{}, false
	}
	at, err := time.Parse(time.RFC3339Nano, string(stamp))
	if err != nil {
		return Line{}, false
	}
	switch rest[0] {
	case 'o':
		ln.Stream = "stdout"
	case 'e':
		ln.Stream = "stderr"
	default:
		return Line{}, false
	}
	ln.Time, ln.Text = at, strings.TrimSuffix(string(rest[2:]), "\r")
	return ln, true
}

// A LogWriter writes an instance's log file for drivers that have no shim. It
// is safe for concurrent use. A line that cannot be written, the disk being
// full, is lost: an app must not stop because its log cannot grow.
type LogWriter struct {
	path  string
	limit int64
	mu    sync.Mutex // guards below
	f     *os.File
	size  int64
}

// NewLogWriter appends to the log at path, see Logs.Path.
func NewLogWriter(path string) (*LogWriter, error) {
	w := &LogWriter{path: path, limit: LogBytes}
	return w, w.reopen()
}

func (w *LogWriter) reopen() error {
	f, err := os.OpenFile(w.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("open log: %w", err), f.Close())
	}
	w.f, w.size = f, fi.Size()
	return nil
}

// Copy writes what it reads, a line at a time, until r ends.
func (w *LogWriter) Copy(stream byte, r io.Reader) error {
	br := bufio.NewReaderSize(r, MaxLine)
	for {
		b, err := br.ReadSlice('\n')
		if len(b) > 0 {
			w.line(stream, bytes.TrimSuffix(b, []byte("\n")))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if errors.Is(err, io.EOF) || errors.Is(err, fs.ErrClosed) {
				return nil
			}
			return err
		}
	}
}

const stampForm = "2006-01-02T15:04:05.000000000Z"

// Print writes one line of stream 'o' or 'e'; what is longer than MaxLine is
// cut, and line ends in it become spaces.
func (w *LogWriter) Print(stream byte, text string) {
	text = strings.NewReplacer("\n", " ", "\r", " ").Replace(text[:min(len(text), MaxLine)])
	w.line(stream, []byte(text))
}

func (w *LogWriter) line(stream byte, text []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := time.Now().UTC().AppendFormat(make([]byte, 0, len(text)+40), stampForm)
	b = append(b, ' ', stream, ' ')
	b = append(append(b, text...), '\n')
	if w.size > 0 && w.size+int64(len(b)) > w.limit {
		for i := logFiles - 1; i > 0; i-- {
			_ = os.Rename(rotated(w.path, i-1), rotated(w.path, i))
		}
		_ = w.f.Close()
		if w.reopen() != nil {
			return
		}
	}
	if _, err := w.f.Write(b); err != nil {
		_ = w.f.Truncate(w.size) // no half line for the next one to be glued to
		return
	}
	w.size += int64(len(b))
}

// Close ends the log.
func (w *LogWriter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.f.Close()
}

// lastOf is the last n lines of one instance.
func lastOf(ctx context.Context, d Driver, r Ref, instance string, n int) []Line {
	var got []Line
	for ln, err := range d.Logs(ctx, r, 200, false) {
		if err != nil {
			break
		}
		if cmp.Or(instance, ln.Instance) == ln.Instance {
			got = append(got, ln)
		}
	}
	return got[max(0, len(got)-n):]
}
