package gateway

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"net/url"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
)

var (
	//go:embed assets/docs.html
	docsHTML string
	//go:embed assets/docs.css
	docsCSS string
	//go:embed assets/docs.js
	docsJS string
)

// docsPage loads nothing from anywhere: it works on a machine without network.
var docsPage = template.Must(template.New("docs").Parse(docsHTML))

// docsPolicy lets the page run its own script and call its own host, no more.
var docsPolicy = fmt.Sprintf("default-src 'none'; style-src 'sha256-%s'; script-src 'sha256-%s'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	sum64(docsCSS), sum64(docsJS))

func sum64(s string) string {
	h := sha256.Sum256([]byte(s))
	return base64.StdEncoding.EncodeToString(h[:])
}

type docField struct {
	Name, Type, Link, Text string
	Deprecated             bool
}

type docMessage struct {
	ID, Name, Text string
	Fields         []docField
	Values         []docField // of an enum
}

type docMethod struct {
	ID, Name, Path, Kind, Text, Example, Curl string
	In, InLink, Out, OutLink                  string
	Stream, Client, Deprecated                bool
	Routes                                    []string
}

type docService struct {
	ID, Name, Text string
	Methods        []docMethod
}

// docs is the page for people, and the policy it is to be served with.
func (v *view) docs() (page []byte, policy string) {
	data := struct {
		App, Release, Base, Host, Module string
		CSS                              template.CSS
		JS                               template.JS
		Services                         []docService
		Messages                         []docMessage
	}{
		App: v.api.App, Release: fmt.Sprintf("v%d", v.api.Release), Base: v.base, Host: v.host, Module: v.module(),
		CSS: template.CSS(docsCSS), JS: template.JS(docsJS), // ours, not the app's
	}
	for _, s := range v.services {
		ds := docService{ID: string(s.desc.FullName()), Name: string(s.desc.FullName()), Text: comment(s.desc)}
		for _, m := range s.methods {
			ex, _ := json.MarshalIndent(example(m.desc.Input(), 2), "", "  ") // strings, numbers, lists and maps of them
			short, _ := json.Marshal(example(m.desc.Input(), 0))
			dm := docMethod{
				ID: m.path, Name: string(m.desc.Name()), Path: m.path, Kind: kindOf(m), Text: comment(m.desc), Example: string(ex),
				Curl:   fmt.Sprintf("curl %s%s -d '%s'", v.base, m.path, strings.ReplaceAll(string(short), "'", `'\''`)),
				Stream: m.desc.IsStreamingServer(), Client: m.desc.IsStreamingClient(), Deprecated: deprecated(m.desc),
			}
			dm.In, dm.InLink = v.typeName(m.desc.Input())
			dm.Out, dm.OutLink = v.typeName(m.desc.Output())
			for _, b := range bindingsOf(m) {
				verb := b.verb
				if verb == "" {
					verb = "any"
				}
				dm.Routes = append(dm.Routes, verb+" "+b.template)
			}
			ds.Methods = append(ds.Methods, dm)
		}
		data.Services = append(data.Services, ds)
	}
	for _, md := range v.messages {
		dm := docMessage{ID: string(md.FullName()), Name: string(md.FullName()), Text: comment(md)}
		for i := range md.Fields().Len() {
			fd := md.Fields().Get(i)
			f := docField{Name: fd.JSONName(), Text: comment(fd), Deprecated: deprecated(fd)}
			f.Type, f.Link = v.fieldType(fd)
			if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() {
				f.Type += " (one of " + string(o.Name()) + ")"
			}
			dm.Fields = append(dm.Fields, f)
		}
		data.Messages = append(data.Messages, dm)
	}
	for _, ed := range v.enums {
		dm := docMessage{ID: string(ed.FullName()), Name: string(ed.FullName()), Text: comment(ed)}
		for i := range ed.Values().Len() {
			val := ed.Values().Get(i)
			dm.Values = append(dm.Values, docField{Name: string(val.Name()), Type: fmt.Sprint(val.Number()), Text: comment(val)})
		}
		data.Messages = append(data.Messages, dm)
	}
	var buf bytes.Buffer
	if err := docsPage.Execute(&buf, data); err != nil {
		return fmt.Appendf(nil, "the page cannot be made: %v", err), docsPolicy // a Buffer takes everything, and the template is tested
	}
	return buf.Bytes(), docsPolicy
}

func (v *view) typeName(d protoreflect.Descriptor) (name, link string) {
	if v.short[d.FullName()] == "" {
		return string(d.FullName()), ""
	}
	return string(d.FullName()), "#" + url.PathEscape(string(d.FullName()))
}

func (v *view) fieldType(fd protoreflect.FieldDescriptor) (name, link string) {
	if fd.IsMap() {
		val, link := v.fieldType(fd.MapValue())
		return "map<" + fd.MapKey().Kind().String() + ", " + val + ">", link
	}
	name = fd.Kind().String()
	switch {
	case fd.Enum() != nil:
		name, link = v.typeName(fd.Enum())
	case fd.Message() != nil:
		name, link = v.typeName(fd.Message())
	}
	if fd.IsList() {
		name = "repeated " + name
	}
	return name, link
}
