// Command runplugins runs protobuf plugins inside a build and keeps what they
// make for the go command, as an overlay: the source itself stays read-only.
//
// Package build embeds this file and compiles it inside the build, with the
// toolchain of the app and nothing else at hand. So it is one file that uses
// the standard library of Go 1.21 only, and decodes the plugins' answer itself.
//
//	runplugins JOB PLUGINS OUT
//
// JOB holds job.json and the requests it names, PLUGINS a folder for each
// plugin, OUT gets the files and overlay.json.
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// A Job is all that one build generates. Package build writes it.
type Job struct {
	Source string   // absolute path of the tree as the go command will see it
	Result string   // where the go command will find OUT
	Runs   []Run    // independent of each other
	Remove []string // files of the tree that are to be gone
}

// A Run is one call of a plugin.
type Run struct {
	Name    string // protoc-gen-go
	Version string // v1.36.12
	Program string // its path below PLUGINS
	Request string // name of the file in JOB
	Out     string // folder of the tree that names of the answer are relative to
}

// maxAnswer bounds what a plugin may write.
const maxAnswer = 256 << 20

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: runplugins JOB PLUGINS OUT")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(jobDir, plugins, out string) error {
	b, err := os.ReadFile(filepath.Join(jobDir, "job.json"))
	if err != nil {
		return err
	}
	var job Job
	if err := json.Unmarshal(b, &job); err != nil {
		return fmt.Errorf("read job.json: %w", err)
	}
	answers := make([][]byte, len(job.Runs))
	errs := make([]error, len(job.Runs))
	var wg sync.WaitGroup
	wg.Add(len(job.Runs))
	for i, r := range job.Runs {
		go func(i int, r Run) {
			defer wg.Done()
			answers[i], errs[i] = r.call(jobDir, plugins)
		}(i, r)
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	replace := map[string]string{}
	for _, f := range job.Remove {
		replace[path.Join(job.Source, f)] = ""
	}
	by := map[string]string{}
	for i, r := range job.Runs {
		files, err := decode(answers[i])
		if err != nil {
			return fmt.Errorf("%s %s failed: %w", r.Name, r.Version, err)
		}
		for _, name := range sorted(files) {
			at := path.Join(r.Out, name)
			if other, ok := by[at]; ok {
				return fmt.Errorf("%s %s failed: it writes %s, and so does %s", r.Name, r.Version, at, other)
			}
			by[at] = r.Name
			file := filepath.Join(out, "files", filepath.FromSlash(at))
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(file, files[name], 0o644); err != nil {
				return err
			}
			replace[path.Join(job.Source, at)] = path.Join(job.Result, "files", at)
		}
	}
	// What the go command calls an overlay. Its keys come out sorted.
	b, err = json.MarshalIndent(map[string]any{"Replace": replace}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "overlay.json"), b, 0o644)
}

func sorted(files map[string][]byte) []string {
	var names []string
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// call runs the plugin and returns its answer. What it says on stderr is
// passed on, and its first line is in the error.
func (r Run) call(jobDir, plugins string) ([]byte, error) {
	in, err := os.Open(filepath.Join(jobDir, r.Request))
	if err != nil {
		return nil, err
	}
	defer in.Close() //nolint:errcheck // only read
	answer, said := &head{max: maxAnswer}, &head{max: 64 << 10}
	cmd := exec.Command(filepath.Join(plugins, r.Program))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, answer, io.MultiWriter(os.Stderr, said)
	err = cmd.Run()
	switch {
	case answer.more:
		return nil, fmt.Errorf("%s %s failed: its answer is larger than %d MB", r.Name, r.Version, maxAnswer>>20)
	case err != nil:
		why := firstLine(said.Bytes())
		if why == "" {
			why = "it said nothing"
		}
		return nil, fmt.Errorf("%s %s failed: %s (%w)", r.Name, r.Version, why, err)
	}
	return answer.Bytes(), nil
}

func firstLine(b []byte) string {
	for _, l := range strings.Split(string(b), "\n") {
		if l = strings.TrimSpace(l); l != "" {
			return l
		}
	}
	return ""
}

// A head keeps the first bytes of what is written and drops the rest.
type head struct {
	bytes.Buffer
	max  int
	more bool
}

func (h *head) Write(p []byte) (int, error) {
	keep := p
	if h.Len()+len(p) > h.max {
		keep, h.more = p[:h.max-h.Len()], true
	}
	_, err := h.Buffer.Write(keep)
	return len(p), err
}

// decode reads a google.protobuf.compiler.CodeGeneratorResponse: its error, or
// its files by name. A name that leads elsewhere, a file that comes twice and
// an insertion point are errors.
func decode(b []byte) (map[string][]byte, error) {
	files := map[string][]byte{}
	last := ""
	err := fields(b, func(number uint64, value []byte) error {
		switch number {
		case 1:
			return errors.New(firstLine(value))
		case 15:
			return file(value, files, &last)
		}
		return nil
	})
	return files, err
}

// file reads one CodeGeneratorResponse.File. One without a name goes on with
// the file before it.
func file(b []byte, files map[string][]byte, last *string) error {
	var name, point, content string
	err := fields(b, func(number uint64, value []byte) error {
		switch number {
		case 1:
			name = string(value)
		case 2:
			point = string(value)
		case 15:
			content = string(value)
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case point != "":
		return fmt.Errorf("it inserts into %.200q at %.200q; only plugins that write whole files are run", name, point)
	case name == "" && *last == "":
		return errors.New("its first file has no name")
	case name == "":
		files[*last] = append(files[*last], content...)
		return nil
	case !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\\\x00"):
		return fmt.Errorf("it writes to %.200q, which is not a path below its folder", name)
	}
	if _, ok := files[name]; ok {
		return fmt.Errorf("it writes %.200q twice", name)
	}
	files[name] = []byte(content)
	*last = name
	return nil
}

var errCut = errors.New("its answer is not a CodeGeneratorResponse")

// fields calls fn for each length-delimited field of a message and passes the
// others by.
func fields(b []byte, fn func(number uint64, value []byte) error) error {
	for len(b) > 0 {
		tag, n := binary.Uvarint(b)
		if n <= 0 || tag>>3 == 0 {
			return errCut
		}
		b = b[n:]
		size := uint64(0)
		switch tag & 7 {
		case 0:
			if _, n = binary.Uvarint(b); n <= 0 {
				return errCut
			}
			size = uint64(n)
		case 1:
			size = 8
		case 5:
			size = 4
		case 2:
			length, n := binary.Uvarint(b)
			if n <= 0 || length > uint64(len(b)-n) {
				return errCut
			}
			if err := fn(tag>>3, b[n:n+int(length)]); err != nil {
				return err
			}
			size = uint64(n) + length
		default:
			return errCut
		}
		if size > uint64(len(b)) {
			return errCut
		}
		b = b[size:]
	}
	return nil
}
