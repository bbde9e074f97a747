//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The log's shape is package runtime's (runtime/log.go); a test there reads
// what is written here.
const (
	maxLine  = 16 << 10
	logBytes = 10 << 20
	logFiles = 3
	pipeSize = 1 << 20 // lets the app run ahead of the disk for a moment
	chunk    = 64 << 10
	stamp    = "2006-01-02T15:04:05.000000000Z"
	// drainFor bounds the wait for what is left in the pipes: the container's
	// processes are dead by then, so they end at once.
	drainFor = 5 * time.Second
)

type logger struct {
	path    string
	readers []*os.File
	copies  sync.WaitGroup

	mu   sync.Mutex // guards below
	f    *os.File
	size int64
	lost int64 // bytes that could not be written since the last that could
}

func openLog(path string) (*logger, error) {
	l := &logger{path: path}
	return l, l.reopen()
}

func (l *logger) reopen() error {
	f, err := os.OpenFile(l.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	if l.f != nil {
		_ = l.f.Close()
	}
	l.f, l.size = f, fi.Size()
	return nil
}

// pipes makes the container's stdin, stdout and stderr and reads the latter two.
func (l *logger) pipes() (stdio [3]*os.File, err error) {
	if stdio[0], err = os.Open(os.DevNull); err != nil {
		return stdio, fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	for i, stream := range []byte{'o', 'e'} {
		r, w, err := os.Pipe()
		if err != nil {
			return stdio, fmt.Errorf("make pipe: %w", err)
		}
		// Beyond the user's limit of pipe memory this fails, harmlessly.
		_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, pipeSize)
		stdio[i+1] = w
		l.readers = append(l.readers, r)
		l.copies.Go(func() { l.copy(stream, r) })
	}
	return stdio, nil
}

// finish waits for the end of both pipes and closes the log.
func (l *logger) finish() {
	t := time.AfterFunc(drainFor, func() {
		for _, r := range l.readers {
			_ = r.SetReadDeadline(time.Now())
		}
	})
	l.copies.Wait()
	t.Stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.f.Close()
}

// copy reads until the pipe ends, whether or not the log can be written: an
// app must never block on its log.
func (l *logger) copy(stream byte, r io.Reader) {
	buf := make([]byte, 0, chunk+maxLine)
	var out []byte
	for {
		n, err := r.Read(buf[len(buf) : len(buf)+min(chunk, cap(buf)-len(buf))])
		buf = buf[:len(buf)+n]
		now := time.Now().UTC()
		rest := buf
		out = out[:0]
		for len(rest) > 0 {
			i := bytes.IndexByte(rest[:min(len(rest), maxLine)], '\n')
			text, skip := rest, len(rest)
			switch {
			case i >= 0:
				text, skip = rest[:i], i+1
			case len(rest) >= maxLine:
				text, skip = rest[:maxLine], maxLine
			case err == nil:
				skip = 0 // the line goes on
			}
			if skip == 0 {
				break
			}
			out = now.AppendFormat(out, stamp)
			out = append(out, ' ', stream, ' ')
			out = append(append(out, text...), '\n')
			rest = rest[skip:]
		}
		buf = buf[:copy(buf[:cap(buf)], rest)]
		if len(out) > 0 {
			l.write(out)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
				fmt.Fprintln(os.Stderr, "m3o-shim: read output:", err)
			}
			return
		}
	}
}

func (l *logger) write(b []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > 0 && l.size+int64(len(b)) > logBytes {
		l.rotate()
	}
	n := int64(len(b))
	if l.lost > 0 {
		note := time.Now().UTC().AppendFormat(nil, stamp)
		note = fmt.Appendf(note, " e m3o: %d bytes of log lost, they could not be written\n", l.lost)
		b = append(note, b...)
	}
	if _, err := l.f.Write(b); err != nil {
		// No half line for the next one to be glued to.
		_ = l.f.Truncate(l.size)
		l.lost += n
		return
	}
	l.size += int64(len(b))
	l.lost = 0
}

func (l *logger) rotate() {
	for i := logFiles - 1; i > 0; i-- {
		from := l.path
		if i > 1 {
			from += "." + strconv.Itoa(i-1)
		}
		_ = os.Rename(from, l.path+"."+strconv.Itoa(i))
	}
	if err := l.reopen(); err != nil {
		fmt.Fprintln(os.Stderr, "m3o-shim:", err) // go on in the old file
		l.size = 0
	}
}
