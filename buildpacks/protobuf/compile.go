package protobuf

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/linker"
	"github.com/bufbuild/protocompile/parser"
	"github.com/bufbuild/protocompile/protoutil"
	"github.com/bufbuild/protocompile/reporter"
	"github.com/m3o/m3o"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Compile makes descriptors of the sources, with comments. What is wrong with
// them is one error of kind Invalid: up to twenty lines "file:line:col:
// message" with paths of the tree. Imports that nothing uses become Notes.
//
// With a go.mod in Sources.Dir, Result.Stale says which generated Go files are
// missing or out of date.
//
// Sources without files give a Result with an empty Set. An error that is about
// nothing but files that are imported and not there matches ErrMissingImport.
func Compile(ctx context.Context, s Sources) (*Result, error) {
	res := &Result{Sources: s, Set: &descriptorpb.FileDescriptorSet{}, Notes: slices.Clone(s.Notes)}
	if len(s.Files) == 0 {
		return res, nil
	}
	c := compiler{Sources: s, loaded: map[string]*loaded{}, names: map[string]string{}, google: map[string]bool{}}
	if err := c.load(ctx); err != nil {
		return nil, err
	}
	files, err := c.compile(ctx)
	if err != nil {
		return nil, err
	}
	if res.Set, err = descriptors(files); err != nil {
		return nil, err
	}
	res.Notes = append(res.Notes, c.notes()...)
	if err := res.readGo(); err != nil {
		return nil, err
	}
	res.Services = services(res.Sources, res.Set)
	return res, nil
}

type loaded struct {
	path    string // in the tree
	src     []byte
	imports []importLine
}

type compiler struct {
	Sources
	loaded map[string]*loaded // by name; nil for a file the compiler brings along
	names  map[string]string  // path → name
	google map[string]bool    // Google's files that are used as linked
	total  int

	faults   []fault
	missing  int // of them are imports that are not there
	more     int // faults that were not kept
	warnings []fault
}

func (c *compiler) fault(f fault) {
	if len(c.faults) >= 1000 {
		c.more++
		return
	}
	c.faults = append(c.faults, f)
}

// load reads every file, directly imported or not, before anything is parsed:
// the compiler stops at the first import it cannot find, and a parser's stack
// overflow would take the process with it.
func (c *compiler) load(ctx context.Context) error {
	queue := make([]string, 0, len(c.Files))
	for _, f := range c.Files {
		queue = append(queue, f.Name)
	}
	for len(queue) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		name := queue[0]
		queue = queue[1:]
		if c.loaded[name] != nil || wellKnown()[name] != nil {
			continue
		}
		p, ok := c.lookup(name)
		if !ok {
			// Reported where it is imported, or one of Google's: what that
			// imports may have a copy in the tree.
			if fd := googleapis()[name]; fd != nil && !c.google[name] {
				c.google[name] = true
				queue = append(queue, fd.GetDependency()...)
			}
			continue
		}
		src, err := readProto(c.Tree, p, &c.total)
		if err != nil {
			return err
		}
		if len(c.loaded) >= maxFiles {
			return invalid("name the folders that count in buf.yaml", "more than %d .proto files with their imports", maxFiles)
		}
		sc := scan(p, src)
		c.loaded[name] = &loaded{p, src, sc.imports}
		for _, f := range sc.faults {
			c.fault(f)
		}
		if other, ok := c.names[p]; ok && other != name {
			c.fault(fault{path: p, msg: fmt.Sprintf("the file is imported as %q and as %q; use one name everywhere", other, name)})
		}
		c.names[p] = name
		for _, imp := range sc.imports {
			if wellKnown()[imp.name] != nil {
				continue
			}
			_, ok := c.lookup(imp.name)
			if ok || linked(imp.name) {
				queue = append(queue, imp.name)
			} else {
				c.missing++
				c.fault(fault{p, imp.line, imp.col, missingMsg(c.Sources, imp.name)})
			}
		}
	}
	c.cycles()
	return c.err()
}

func missingMsg(s Sources, name string) string {
	msg := fmt.Sprintf("imported file %q is not in the repository", short(name))
	if o := originOf(name); o != "" {
		return msg + "; it is published as " + o + ": copy it into " + path.Join(s.Dir, "third_party/proto")
	}
	return msg
}

// cycles reports each circle of imports once, where it closes.
func (c *compiler) cycles() {
	const (
		fresh = iota
		open
		done
	)
	state := map[string]int{}
	type frame struct {
		name string
		next int
	}
	for _, f := range c.Files {
		if state[f.Name] != fresh || c.loaded[f.Name] == nil {
			continue
		}
		// A loop with its own stack: an import chain may be thousands long.
		stack := []frame{{name: f.Name}}
		state[f.Name] = open
		for len(stack) > 0 {
			top := &stack[len(stack)-1]
			l := c.loaded[top.name]
			if top.next >= len(l.imports) {
				state[top.name] = done
				stack = stack[:len(stack)-1]
				continue
			}
			imp := l.imports[top.next]
			top.next++
			if c.loaded[imp.name] == nil {
				continue
			}
			switch state[imp.name] {
			case fresh:
				state[imp.name] = open
				stack = append(stack, frame{name: imp.name})
			case open:
				i := slices.IndexFunc(stack, func(f frame) bool { return f.name == imp.name })
				var circle []string
				for _, f := range stack[i:] {
					circle = append(circle, f.name)
				}
				circle = append(circle, imp.name)
				if len(circle) > 8 {
					circle = slices.Concat(circle[:4], []string{"…"}, circle[len(circle)-3:])
				}
				c.fault(fault{l.path, imp.line, imp.col, "the imports go round in a circle: " + strings.Join(circle, " → ")})
			}
		}
	}
}

// FindFileByPath is the compiler's way to the files that load read.
func (c *compiler) FindFileByPath(name string) (protocompile.SearchResult, error) {
	if fd, ok := wellKnown()[name]; ok {
		return protocompile.SearchResult{Desc: fd}, nil
	}
	if l := c.loaded[name]; l != nil {
		return protocompile.SearchResult{Source: bytes.NewReader(l.src)}, nil
	}
	if fd, ok := googleapis()[name]; ok {
		return protocompile.SearchResult{Proto: fd}, nil
	}
	return protocompile.SearchResult{}, fmt.Errorf("%q is not in the repository", name)
}

func (c *compiler) compile(ctx context.Context) (linker.Files, error) {
	pc := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(c),
		SourceInfoMode: protocompile.SourceInfoStandard,
		Reporter: reporter.NewReporter(
			func(e reporter.ErrorWithPos) error {
				c.fault(c.place(e))
				return nil
			},
			func(e reporter.ErrorWithPos) {
				if errors.Is(e, parser.ErrNoSyntax) {
					return // proto2 without a syntax line is old, not wrong
				}
				c.warnings = append(c.warnings, c.place(e))
			}),
	}
	names := make([]string, len(c.Files))
	for i, f := range c.Files {
		names[i] = f.Name
	}
	files, err := pc.Compile(ctx, names...)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if ferr := c.err(); ferr != nil {
		return nil, ferr
	}
	if err != nil {
		// A fault without a place, or one that ended the compilation before
		// it was reported.
		f := fault{msg: err.Error()}
		if p, ok := errors.AsType[protocompile.PanicError](err); ok {
			f = fault{path: c.Path(p.File), msg: "the compiler cannot handle this file"}
		} else if e, ok := errors.AsType[reporter.ErrorWithPos](err); ok {
			f = c.place(e)
		} else {
			f.path = c.Dir
		}
		c.fault(f)
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: c.err().Error(), Err: err}
	}
	return files, nil
}

func (c *compiler) place(e reporter.ErrorWithPos) fault {
	pos := e.GetPosition()
	return fault{path: c.Path(pos.Filename), line: pos.Line, col: pos.Col, msg: c.message(e.Unwrap().Error())}
}

// message gives other places that a message names, such as the first
// definition of a symbol, their paths of the tree.
func (c *compiler) message(msg string) string {
	for _, quote := range []string{"defined at ", "declared at ", "reserved at ", "used at ", "in file "} {
		i := strings.Index(msg, quote)
		if i < 0 {
			continue
		}
		rest := strings.Trim(msg[i+len(quote):], `"`)
		name, _, _ := strings.Cut(rest, ":")
		if p := c.Path(name); p != name {
			msg = msg[:i+len(quote)] + strings.Replace(msg[i+len(quote):], name, p, 1)
		}
	}
	if utf := strings.ToValidUTF8(msg, "?"); len(utf) > 500 {
		return strings.ToValidUTF8(utf[:500], "") + "…"
	} else {
		return utf
	}
}

// err is all faults as one error, nil when there are none.
func (c *compiler) err() error {
	if len(c.faults) == 0 {
		return nil
	}
	sortFaults(c.faults)
	all := slices.Compact(c.faults)
	lines := make([]string, 0, maxErrors+1)
	for _, f := range all[:min(len(all), maxErrors)] {
		lines = append(lines, f.String())
	}
	if n := len(all) - maxErrors + c.more; n > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", n))
	}
	e := &m3o.Error{Kind: m3o.Invalid, Msg: strings.Join(lines, "\n")}
	if c.missing == len(c.faults) && c.more == 0 {
		e.Err = ErrMissingImport
	}
	return e
}

func sortFaults(fs []fault) {
	slices.SortFunc(fs, func(a, b fault) int {
		return cmp.Or(cmp.Compare(a.path, b.path), cmp.Compare(a.line, b.line), cmp.Compare(a.col, b.col), cmp.Compare(a.msg, b.msg))
	})
}

func (c *compiler) notes() []string {
	sortFaults(c.warnings)
	var notes []string
	for _, w := range slices.Compact(c.warnings) {
		notes = append(notes, w.String())
	}
	return notes
}

// descriptors is the closed set of the files and what they import, each after
// its imports.
func descriptors(files linker.Files) (*descriptorpb.FileDescriptorSet, error) {
	set := &descriptorpb.FileDescriptorSet{}
	done := map[string]bool{}
	var add func(fd protoreflect.FileDescriptor)
	add = func(fd protoreflect.FileDescriptor) {
		if done[fd.Path()] {
			return
		}
		done[fd.Path()] = true
		for i := range fd.Imports().Len() {
			add(fd.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protoutil.ProtoFromFileDescriptor(fd))
	}
	for _, f := range files {
		add(f)
	}
	// Once through bytes, so that custom options are what any other reader of
	// the set sees and not the compiler's own dynamic messages.
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("encode descriptors: %w", err)
	}
	out := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(b, out); err != nil {
		return nil, fmt.Errorf("decode descriptors: %w", err)
	}
	return out, nil
}
