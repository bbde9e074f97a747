package golang

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/m3o/m3o/buildpacks"
)

// stamps are the texts that a build sets where a main package has a variable
// for them, by the names that the Go world uses.
var stamps = []struct{ value, names string }{
	{"$VERSION", "version Version buildVersion BuildVersion"},
	{"$COMMIT", "commit Commit gitCommit GitCommit revision Revision"},
	{"$TIME", "date Date buildTime BuildTime buildDate BuildDate"},
}

// stamp is the linker's flags that tell the targets' main packages which
// commit they are of. The time is that of the commit: the same commit makes
// the same binary.
func (p *planner) stamp() string {
	have := map[string]bool{}
	for _, t := range p.plan.Targets {
		dir := path.Join(p.dir, t.Package)
		des, _ := fs.ReadDir(p.tree, dir)
		for _, de := range des {
			if n := de.Name(); strings.HasSuffix(n, ".go") && !strings.HasSuffix(n, "_test.go") {
				if b, err := buildpacks.ReadSmall(p.tree, path.Join(dir, n)); err == nil {
					textVars(b, have)
				}
			}
		}
	}
	var out []string
	for _, s := range stamps {
		for name := range strings.FieldsSeq(s.names) {
			flag := "main." + name + "="
			if have[name] && !strings.Contains(p.man.LDFlags, flag) {
				out = append(out, "-X "+flag+s.value)
			}
		}
	}
	return strings.Join(out, " ")
}

// textVars finds the package's variables of type string that the linker can
// set: those without a value or with a literal one.
func textVars(src []byte, have map[string]bool) {
	f, err := parser.ParseFile(token.NewFileSet(), "", src, parser.SkipObjectResolution)
	if err != nil {
		return // the compiler says it better
	}
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.VAR {
			continue
		}
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			id, typed := v.Type.(*ast.Ident)
			literal := len(v.Values) > 0 && !slices.ContainsFunc(v.Values, func(e ast.Expr) bool {
				l, ok := e.(*ast.BasicLit)
				return !ok || l.Kind != token.STRING
			})
			if literal && v.Type == nil || typed && id.Name == "string" && (literal || len(v.Values) == 0) {
				for _, n := range v.Names {
					have[n.Name] = true
				}
			}
		}
	}
}
