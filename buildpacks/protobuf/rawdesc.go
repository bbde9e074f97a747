package protobuf

import (
	"bytes"
	"compress/gzip"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"regexp"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

// maxRaw bounds an embedded descriptor. Go files beyond it are not parsed.
const maxRaw = 16 << 20

var errNoRaw = errors.New("no embedded descriptor")

// rawDescriptor reads the descriptor that protoc-gen-go, in any version since
// the 2010s, embeds into a .pb.go:
//
//	const file_x_proto_rawDesc = "" + "…" + …          since v1.36.5
//	var file_x_proto_rawDesc = string([]byte{0x0a, …}) v1.36.3, v1.36.4
//	var file_x_proto_rawDesc = []byte{0x0a, …}         v1.20 to v1.36.2
//	var fileDescriptor_xx = []byte{0x1f, 0x8b, …}      before, gzipped; gogo too
func rawDescriptor(src []byte) (*descriptorpb.FileDescriptorProto, error) {
	if len(src) > maxRaw {
		return nil, errNoRaw
	}
	lit, err := rawLiteral(src)
	if err != nil {
		return nil, err
	}
	if len(lit) > 2 && lit[0] == 0x1f && lit[1] == 0x8b {
		zr, err := gzip.NewReader(bytes.NewReader(lit))
		if err != nil {
			return nil, err
		}
		if lit, err = io.ReadAll(io.LimitReader(zr, maxRaw)); err != nil {
			return nil, err
		}
	}
	fd := &descriptorpb.FileDescriptorProto{}
	if err := (proto.UnmarshalOptions{AllowPartial: true, DiscardUnknown: false}).Unmarshal(lit, fd); err != nil {
		return nil, err
	}
	return fd, nil
}

func rawName(name string) bool {
	return strings.HasSuffix(name, "_rawDesc") || strings.HasPrefix(name, "fileDescriptor")
}

var rawStart = regexp.MustCompile(`(?m)^(?:var|const) (\w+(?:_rawDesc)|fileDescriptor\w+) = `)

// rawLiteral finds the declaration and evaluates it. Only that declaration is
// parsed: it is half of a big file, and the other half is of no use.
func rawLiteral(src []byte) ([]byte, error) {
	loc := rawStart.FindIndex(src)
	if loc == nil {
		return nil, errNoRaw
	}
	decl := src[loc[0]:]
	// gofmt ends a top-level declaration before the next line that begins
	// with a letter or a slash.
	for _, end := range []string{"\n\nvar ", "\n\nfunc ", "\n\nconst ", "\n\ntype ", "\n\n// ", "\n\nimport "} {
		if i := bytes.Index(decl, []byte(end)); i >= 0 {
			decl = decl[:i+1]
		}
	}
	text := append([]byte("package p\n"), decl...)
	if tooNested(text) {
		return nil, errNoRaw
	}
	file, err := parser.ParseFile(token.NewFileSet(), "", text, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok {
			continue
		}
		for _, s := range g.Specs {
			v, ok := s.(*ast.ValueSpec)
			if ok && len(v.Names) == 1 && len(v.Values) == 1 && rawName(v.Names[0].Name) {
				return evaluate(v.Values[0])
			}
		}
	}
	return nil, errNoRaw
}

// tooNested keeps hostile text from the parser: its recursion, and the time it
// takes to give up, which grows with the square of the depth. Generated code
// nests a dozen deep.
func tooNested(src []byte) bool {
	depth := 0
	for i := 0; i < len(src); i++ {
		switch c := src[i]; c {
		case '(', '{', '[':
			if depth++; depth > maxDepth {
				return true
			}
		case ')', '}', ']':
			depth = max(0, depth-1)
		case '"', '\'', '`': // brackets in literals are text
			for i++; i < len(src) && src[i] != c && (c == '`' || src[i] != '\n'); i++ {
				if src[i] == '\\' && c != '`' {
					i++
				}
			}
		case '/':
			if bytes.HasPrefix(src[i:], []byte("//")) {
				if n := bytes.IndexByte(src[i:], '\n'); n >= 0 {
					i += n
				} else {
					return false
				}
			}
		}
	}
	return false
}

// evaluate computes the few forms of constant that generators write.
func evaluate(e ast.Expr) ([]byte, error) {
	var parts [][]byte
	// "a" + "b" + … nests to the left, thousands deep: a loop, not recursion.
	for {
		b, ok := e.(*ast.BinaryExpr)
		if !ok {
			break
		}
		lit, err := literal(b.Y)
		if err != nil || b.Op != token.ADD {
			return nil, errNoRaw
		}
		parts = append(parts, lit)
		e = b.X
	}
	first, err := literal(e)
	if err != nil {
		return nil, err
	}
	out := first
	for i := len(parts) - 1; i >= 0; i-- {
		out = append(out, parts[i]...)
	}
	return out, nil
}

func literal(e ast.Expr) ([]byte, error) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind == token.STRING {
			s, err := strconv.Unquote(e.Value)
			return []byte(s), err
		}
	case *ast.CallExpr: // string([]byte{…})
		if len(e.Args) == 1 {
			if c, ok := e.Args[0].(*ast.CompositeLit); ok {
				return bytesOf(c)
			}
		}
	case *ast.CompositeLit:
		return bytesOf(e)
	}
	return nil, errNoRaw
}

func bytesOf(c *ast.CompositeLit) ([]byte, error) {
	out := make([]byte, 0, len(c.Elts))
	for _, el := range c.Elts {
		lit, ok := el.(*ast.BasicLit)
		if !ok || lit.Kind != token.INT {
			return nil, errNoRaw
		}
		n, err := strconv.ParseUint(lit.Value, 0, 8)
		if err != nil {
			return nil, err
		}
		out = append(out, byte(n))
	}
	return out, nil
}
