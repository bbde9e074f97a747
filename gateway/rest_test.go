package gateway

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/genproto/googleapis/api/httpbody"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o"
)

const library = `
syntax = "proto3";
package lib.v1;
import "google/api/annotations.proto";
import "google/api/httpbody.proto";

service Library {
  rpc GetBook(Book) returns (Book) { option (google.api.http) = { get: "/v1/{name=shelves/*/books/*}" }; }
  rpc ListBooks(Book) returns (Books) { option (google.api.http) = { get: "/v1/books" response_body: "books" additional_bindings { get: "/v1/shelves/{shelf}/books" } }; }
  rpc AddBook(Added) returns (Added) { option (google.api.http) = { post: "/v1/{shelf.name=shelves/*}/books" body: "book" }; }
  rpc Publish(Book) returns (Book) { option (google.api.http) = { post: "/v1/{name=shelves/*/books/*}:publish" body: "*" }; }
  rpc Anything(Book) returns (Book) { option (google.api.http) = { custom: { kind: "*" path: "/files/{name=**}" } }; }
  rpc Wrong(Book) returns (Book) { option (google.api.http) = { get: "/v1/{nothing}" }; }
  rpc Upload(google.api.HttpBody) returns (google.api.HttpBody) { option (google.api.http) = { put: "/blob" body: "*" }; }
}
message Shelf { string name = 1; }
message Book { string name = 1; int32 pages = 2; int64 shelf = 3; repeated string tags = 4; }
message Books { repeated Book books = 1; }
message Added { Shelf shelf = 1; Book book = 2; bool dry = 3; }
`

// echoing is an app that sends back the message it got.
func echoing(t *testing.T) http.RoundTripper {
	t.Helper()
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if strings.HasSuffix(r.URL.Path, "/ListBooks") {
			b = appendFrame(nil, 0, append([]byte{0x0a, byte(len(b) - prefixLen)}, b[prefixLen:]...))
		}
		gr(w, string(b), "0")
	}))
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	t.Cleanup(srv.Close)
	return h2c(t, srv.Listener.Addr().String())
}

func librarySchema(t *testing.T) string {
	t.Helper()
	linked := protocompile.ResolverFunc(func(path string) (protocompile.SearchResult, error) {
		fd, err := protoregistry.GlobalFiles.FindFileByPath(path)
		return protocompile.SearchResult{Desc: fd}, err
	})
	c := protocompile.Compiler{Resolver: protocompile.CompositeResolver{
		&protocompile.SourceResolver{Accessor: protocompile.SourceAccessorFromMap(map[string]string{"lib.proto": library})}, linked,
	}}
	out, err := c.Compile(context.Background(), "lib.proto")
	if err != nil {
		t.Fatal(err)
	}
	fds := &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{protoutil.ProtoFromFileDescriptor(out[0])}}
	for _, fd := range []string{descriptorpb.File_google_protobuf_descriptor_proto.Path(), annotations.File_google_api_http_proto.Path(), annotations.File_google_api_annotations_proto.Path(),
		httpbody.File_google_api_httpbody_proto.Path(), "google/protobuf/any.proto"} {
		f, err := protoregistry.GlobalFiles.FindFileByPath(fd)
		if err != nil {
			t.Fatal(err)
		}
		fds.File = append(fds.File, protodesc.ToFileDescriptorProto(f))
	}
	b, err := proto.Marshal(fds)
	if err != nil {
		t.Fatal(err)
	}
	file := t.TempDir() + "/lib.binpb"
	write(t, file, b)
	return file
}

func TestRoutes(t *testing.T) {
	g, up, file := New(Config{}), echoing(t), librarySchema(t)
	call := func(method, path, body, contentType string, strict bool) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
		if contentType != "" {
			r.Header.Set("Content-Type", contentType)
		}
		g.ServeApp(w, r, &m3o.API{App: "lib", Schema: file, Strict: strict}, up)
		return w
	}
	const js = "application/json"
	for _, tc := range []struct{ method, path, body, want string }{
		{"GET", "/v1/shelves/a/books/b%2Fc?pages=3&tags=x&tags=y", "", `{"name":"shelves/a/books/b/c","pages":3,"tags":["x","y"]}`},
		{"GET", "/v1/books?pages=7", "", `[{"pages":7}]`},
		{"GET", "/v1/shelves/12/books", "", `{"books":[{"shelf":"12"}]}`},
		{"POST", "/v1/shelves/s1/books?dry=true", `{"name":"n"}`, `{"shelf":{"name":"shelves/s1"},"book":{"name":"n"},"dry":true}`},
		{"POST", "/v1/shelves/s1/books", "", `{"shelf":{"name":"shelves/s1"}}`},
		{"POST", "/v1/shelves/a/books/b:publish", `{"pages":9,"name":"path wins"}`, `{"name":"shelves/a/books/b","pages":9}`},
		{"PURGE", "/files/a/b/c", "", `{"name":"a/b/c"}`},
		{"POST", "/lib.v1.Library/Wrong", `{"name":"w"}`, `{"name":"w"}`},
	} {
		if w := call(tc.method, tc.path, tc.body, js, false); w.Code != 200 {
			t.Errorf("%s %s: %d %s", tc.method, tc.path, w.Code, w.Body)
		} else {
			same(t, tc.path, w.Body.String(), tc.want)
		}
	}
	for _, tc := range []struct {
		method, path, body, ct string
		code                   int
		detail                 string
	}{
		{"DELETE", "/v1/books", "", "", 405, "use GET"},
		{"GET", "/v1/shelves/x/books", "", "", 400, `"x" in the path`},
		{"GET", "/v1/books", `{"pages":1}`, js, 400, "takes no body"},
		{"POST", "/v1/shelves/s/books", "<a/>", "text/xml", 415, "text/xml"},
		{"POST", "/v1/shelves/s/books", `{"name":1}`, js, 400, "name"},
		{"GET", "/v1/nothing", "", "", 404, "no method"},
		{"GET", "/v1/x", "", "", 404, "no method"},
	} {
		if w := call(tc.method, tc.path, tc.body, tc.ct, false); w.Code != tc.code || !strings.Contains(w.Body.String(), strings.ReplaceAll(tc.detail, `"`, `\"`)) && !strings.Contains(w.Body.String(), tc.detail) {
			t.Errorf("%s %s: %d %s, want %d with %s", tc.method, tc.path, w.Code, w.Body, tc.code, tc.detail)
		}
	}
	if w := call("DELETE", "/v1/books", "", "", false); w.Header().Get("Allow") != "GET" {
		t.Errorf("Allow: %q", w.Header().Get("Allow"))
	}
	if w := call("PUT", "/blob", "\x00bytes", "image/png", false); w.Code != 200 || w.Body.String() != "\x00bytes" || w.Header().Get("Content-Type") != "image/png" {
		t.Errorf("HttpBody: %d %q %v", w.Code, w.Body, w.Header())
	}
	for _, path := range []string{"/v1/books?nothing=1", "/lib.v1.Library/GetBook"} {
		if w := call("POST", path, `{"nothing":1}`, js, true); w.Code/100 != 4 {
			t.Errorf("strict %s: %d %s", path, w.Code, w.Body)
		}
	}
	w := call("GET", "/-/openapi.json", "", "", false)
	for _, want := range []string{`"/v1/{name}"`, `"/v1/shelves/{shelf}/books"`, `"in": "path"`, `"/v1/{name}:publish"`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("openapi.json lacks %s", want)
		}
	}
}
