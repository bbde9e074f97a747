package gateway

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	grpcmetadata "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/m3o/m3o"
)

const shop = `
syntax = "proto3";
package shop.v1;
import "google/protobuf/timestamp.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/wrappers.proto";
import "google/protobuf/field_mask.proto";
import "google/protobuf/any.proto";
import "google/protobuf/struct.proto";

// Helloworld sells things.
//
// It keeps no state */ at all.
service Helloworld {
  // Call echoes an order. It has no side effects,
  // but does not say so.
  rpc Call(Order) returns (Order);
  rpc Greet(Order) returns (Order) { option idempotency_level = NO_SIDE_EFFECTS; }
  rpc Fail(Order) returns (Order);
  rpc Stream(Order) returns (stream Order);
  rpc Chat(stream Order) returns (stream Order);
  rpc Slow(Order) returns (Order);
}
service BarBaz { rpc DoThis(Order) returns (Order); }

enum Color { RED = 0; GREEN = 1; ALIAS = -2; }
message Item { string name = 1; double price = 2; repeated string tags = 3; Item inner = 4; }
// An Order is what a customer wants.
message Order {
  // Who ordered.
  string name = 1;
  int32 count = 2;
  int64 big = 3;
  uint64 ubig = 4;
  bool ok = 5;
  bytes raw = 6;
  Color color = 7;
  repeated int32 numbers = 8;
  repeated string words = 9;
  Item item = 10;
  repeated Item items = 11;
  map<string, int64> counts = 12;
  map<int32, Item> by_id = 13;
  oneof pick { string left = 14; int32 right = 15; Item sub = 31; }
  float ratio = 16;
  double exact = 17;
  google.protobuf.Timestamp at = 18;
  google.protobuf.Duration took = 19;
  google.protobuf.StringValue maybe = 20;
  google.protobuf.FieldMask mask = 21;
  google.protobuf.Any any = 22;
  optional int32 maybe_zero = 23;
  sint32 zig = 24;
  sint64 zag = 25;
  fixed32 f32 = 26;
  fixed64 f64 = 27;
  sfixed32 s32 = 28;
  sfixed64 s64 = 29;
  uint32 u32 = 30;
  repeated Color colors = 32;
  map<string, Color> paint = 33;
  google.protobuf.Struct free = 34;
  repeated bool flags = 35;
  repeated double points = 36 [packed = false];
  repeated bytes blobs = 37;
  map<bool, string> yesno = 38;
  string odd_name = 200 [json_name = "@odd"];
}
`

// rawCodec passes messages as bytes: the app echoes what it does not know.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.(*[]byte); ok {
		return mem.BufferSlice{mem.SliceBuffer(*b)}, nil
	}
	b, err := proto.Marshal(v.(proto.Message))
	return mem.BufferSlice{mem.SliceBuffer(b)}, err
}
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if b, ok := v.(*[]byte); ok {
		*b = data.Materialize()
		return nil
	}
	return proto.Unmarshal(data.Materialize(), v.(proto.Message))
}

var _ encoding.CodecV2 = rawCodec{}

func compileShop(t testing.TB) (*descriptorpb.FileDescriptorSet, *protoregistry.Files) {
	t.Helper()
	c := protocompile.Compiler{SourceInfoMode: protocompile.SourceInfoStandard, Resolver: protocompile.WithStandardImports(&protocompile.SourceResolver{
		Accessor: protocompile.SourceAccessorFromMap(map[string]string{"shop.proto": shop}),
	})}
	out, err := c.Compile(context.Background(), "shop.proto")
	if err != nil {
		t.Fatal(err)
	}
	fds := &descriptorpb.FileDescriptorSet{}
	files := &protoregistry.Files{}
	var add func(fd protoreflect.FileDescriptor)
	add = func(fd protoreflect.FileDescriptor) {
		for i := range fd.Imports().Len() {
			add(fd.Imports().Get(i).FileDescriptor)
		}
		if _, err := files.FindFileByPath(fd.Path()); err == nil {
			return
		}
		if err := files.RegisterFile(fd); err != nil {
			t.Fatal(err)
		}
		fds.File = append(fds.File, protoutil.ProtoFromFileDescriptor(fd))
	}
	add(out[0])
	return fds, files
}

// app is a gRPC server that echoes.
func app(t testing.TB, reflect bool) (addr string, fds *descriptorpb.FileDescriptorSet) {
	t.Helper()
	fds, files := compileShop(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	order, err := files.FindDescriptorByName("shop.v1.Order")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.ForceServerCodecV2(rawCodec{}), grpc.MaxRecvMsgSize(64<<20), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		name, _ := grpc.MethodFromServerStream(s)
		var b []byte
		if err := s.RecvMsg(&b); err != nil {
			return err
		}
		m := dynamicpb.NewMessage(order.(protoreflect.MessageDescriptor))
		if err := proto.Unmarshal(b, m); err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		get := func(f protoreflect.Name) protoreflect.Value { return m.Get(m.Descriptor().Fields().ByName(f)) }
		md, _ := grpcmetadata.FromIncomingContext(s.Context())
		for _, k := range []string{"authorization", "x-custom", "grpc-encoding"} {
			if v := md.Get(k); v != nil {
				_ = s.SetHeader(grpcmetadata.Pairs("saw-"+k, v[0]))
			}
		}
		s.SetTrailer(grpcmetadata.Pairs("cost", "7"))
		switch name {
		case "/shop.v1.Helloworld/Fail":
			return status.Error(codes.Code(get("count").Int()), get("name").String())
		case "/shop.v1.Helloworld/Stream":
			for range get("count").Int() {
				if err := s.SendMsg(&b); err != nil {
					return err
				}
			}
			if n := get("name").String(); n != "" {
				return status.Error(codes.NotFound, n)
			}
			return nil
		case "/shop.v1.Helloworld/Chat":
			for {
				if err := s.SendMsg(&b); err != nil {
					return err
				}
				if err := s.RecvMsg(&b); errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return err
				}
			}
		case "/shop.v1.Helloworld/Slow":
			<-s.Context().Done()
			return status.FromContextError(s.Context().Err()).Err()
		}
		return s.SendMsg(&b)
	}))
	if reflect {
		reflection.RegisterV1(reflectable{srv, files}) // see reflectable
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return ln.Addr().String(), fds
}

// reflectable is a grpc.Server that says it has the shop's services.
type reflectable struct {
	*grpc.Server
	files *protoregistry.Files
}

func (r reflectable) GetServiceInfo() map[string]grpc.ServiceInfo {
	info := r.Server.GetServiceInfo()
	info["shop.v1.Helloworld"], info["shop.v1.BarBaz"], info["not.Linked"] = grpc.ServiceInfo{}, grpc.ServiceInfo{}, grpc.ServiceInfo{}
	return info
}

func (r reflectable) RegisterService(d *grpc.ServiceDesc, impl any) {
	opts := reflection.ServerOptions{Services: r, DescriptorResolver: both{r.files}}
	if strings.Contains(d.ServiceName, "v1alpha") {
		r.Server.RegisterService(d, reflection.NewServer(opts))
		return
	}
	r.Server.RegisterService(d, reflection.NewServerV1(opts))
}

// both finds the shop's files and, for reflection's own, the linked ones.
type both struct{ *protoregistry.Files }

func (b both) FindFileByPath(p string) (protoreflect.FileDescriptor, error) {
	if fd, err := b.Files.FindFileByPath(p); err == nil {
		return fd, nil
	}
	return protoregistry.GlobalFiles.FindFileByPath(p)
}

func (b both) FindDescriptorByName(n protoreflect.FullName) (protoreflect.Descriptor, error) {
	if d, err := b.Files.FindDescriptorByName(n); err == nil {
		return d, nil
	}
	return protoregistry.GlobalFiles.FindDescriptorByName(n)
}

func h2c(t testing.TB, addr string) http.RoundTripper {
	t.Helper()
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	tr.Protocols.SetUnencryptedHTTP2(true)
	tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func writeSet(t testing.TB, fds *descriptorpb.FileDescriptorSet) string {
	t.Helper()
	b, err := proto.Marshal(fds)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "schema.binpb")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// front is a gateway before the app: /app/… is an app's host, /api/… the API's.
func front(t testing.TB, cfg Config) string {
	t.Helper()
	addr, fds := app(t, false)
	g, up, file := New(cfg), h2c(t, addr), writeSet(t, fds)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if rest, ok := strings.CutPrefix(r.URL.Path, "/api/"); ok {
			app, path, _ := strings.Cut(rest, "/")
			g.ServePath(w, r, &m3o.API{App: app, Schema: file}, path, up)
			return
		}
		if rest, ok := strings.CutPrefix(r.URL.Path, "/host/"); ok { // a path for each host
			host, path, _ := strings.Cut(rest, "/")
			r.Host, r.URL.Path = host, "/app/"+path
		}
		path, strict := strings.CutPrefix(r.URL.Path, "/strict")
		r.URL.Path, r.URL.RawPath = strings.TrimPrefix(path, "/app"), strings.TrimPrefix(r.URL.RawPath, "/app")
		g.ServeApp(w, r, &m3o.API{App: "helloworld", Schema: file, Strict: strict}, up)
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

type request struct {
	method, path, body string
	header             http.Header
}

func (q request) do(t testing.TB, base string) (*http.Response, string) {
	t.Helper()
	if q.method == "" {
		q.method = "POST"
	}
	req, err := http.NewRequestWithContext(t.Context(), q.method, base+q.path, strings.NewReader(q.body))
	if err != nil {
		t.Fatal(err)
	}
	if q.header != nil {
		req.Header = q.header
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close() //nolint:errcheck // a test
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(b)
}

func asJSON(kv ...string) http.Header {
	h := http.Header{"Content-Type": {"application/json"}}
	for i := 0; i < len(kv); i += 2 {
		h.Set(kv[i], kv[i+1])
	}
	return h
}

func same(t testing.TB, what, got, want string) {
	t.Helper()
	var g, w any
	if err := json.Unmarshal([]byte(got), &g); err != nil {
		t.Errorf("%s: got %q: %v", what, got, err)
		return
	}
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(g) != fmt.Sprint(w) {
		t.Errorf("%s: got %s, want %s", what, got, want)
	}
}

func TestCalls(t *testing.T) {
	base := front(t, Config{})
	form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
	for _, tc := range []struct {
		request
		want string
	}{
		{request{path: "/app/shop.v1.Helloworld/Call", body: `{"name":"Ada","count":3}`, header: asJSON()}, `{"name":"Ada","count":3}`},
		{request{path: "/app/shop.v1.Helloworld/Call", body: "", header: asJSON()}, `{}`},
		{request{path: "/app/Helloworld/Call", body: "{}", header: asJSON()}, `{}`},
		{request{path: "/app/shop.v1.Helloworld/Greet?name=Ada", method: "GET"}, `{"name":"Ada"}`},
		{request{path: "/api/helloworld", body: `{"name":"Ada"}`, header: asJSON()}, `{"name":"Ada"}`},
		{request{path: "/api/helloworld/call?name=John", method: "GET"}, `{"name":"John"}`},
		{request{path: "/api/helloworld/Call?name=a&count=4&ok=true&color=GREEN&words=x&words=y&item[name]=n&item.price=1.5&counts[k]=9&numbers[]=1&numbers[]=2&at=2020-01-02T03:04:05Z&took=1.5s&maybe=m&mask=a,b&raw=aGk&unknown=1&big=9007199254740993", method: "GET"},
			`{"name":"a","count":4,"ok":true,"color":"GREEN","words":["x","y"],"item":{"name":"n","price":1.5},"counts":{"k":"9"},"numbers":[1,2],"at":"2020-01-02T03:04:05Z","took":"1.500s","maybe":"m","mask":"a,b","raw":"aGk=","big":"9007199254740993"}`},
		{request{path: "/api/helloworld/greet", body: "name=Ada+L&count=2", header: form}, `{"name":"Ada L","count":2}`},
		{request{path: "/api/helloworld/greet?count=2", body: "--b\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nAda\r\n--b\r\nContent-Disposition: form-data; name=\"raw\"; filename=\"f\"\r\n\r\n\x00\xff\r\n--b--\r\n",
			header: http.Header{"Content-Type": {"multipart/form-data; boundary=b"}}}, `{"name":"Ada","count":2,"raw":"AP8="}`},
		{request{path: "/api/helloworld/greet", body: ` {"name":"curl -d"}`, header: form}, `{"name":"curl -d"}`},
		{request{path: "/api/helloworld/greet?count=1", body: `{"name":"no type"}`, header: http.Header{}}, `{"name":"no type","count":1}`},
		{request{path: "/api/helloworld/greet?count=1&name=q", body: `{"name":"body wins"}`, header: asJSON()}, `{"name":"body wins","count":1}`},
		{request{path: "/api/foo/bar-baz/do-this", body: `{"@odd":"x"}`, header: asJSON()}, `{"@odd":"x"}`},
		{request{path: "/api/foo/v1/barbaz/dothis", method: "DELETE"}, `{}`},
		{request{path: "/api/foo/shop.v1.BarBaz/DoThis", body: `{"nothing":{"like":["this"]}}`, header: asJSON()}, `{}`},
	} {
		res, body := tc.do(t, base)
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %s: %s %s", tc.method, tc.path, res.Status, body)
			continue
		}
		same(t, tc.path, body, tc.want)
	}
}

func TestErrors(t *testing.T) {
	base := front(t, Config{MaxMessage: 1 << 20})
	big := `{"name":"` + strings.Repeat("x", 2<<20) + `"}`
	var zip bytes.Buffer
	z := gzip.NewWriter(&zip)
	_, _ = io.WriteString(z, big)
	_ = z.Close()
	for name, tc := range map[string]struct {
		request
		code   int
		detail string
	}{
		"unknown method":      {request{path: "/app/shop.v1.Helloworld/Cal", header: asJSON()}, 404, "/shop.v1.Helloworld/Call"},
		"unknown service":     {request{path: "/api/helloworld/x/y"}, 404, `no method "/x/y"`},
		"root of an app":      {request{path: "/app/", method: "GET"}, 404, "/shop.v1.Helloworld/Call"},
		"GET of a write":      {request{path: "/app/shop.v1.Helloworld/Call", method: "GET"}, 405, "use POST"},
		"malformed JSON":      {request{path: "/api/helloworld", body: `{"name":`, header: asJSON()}, 400, "shop.v1.Order"},
		"not an object":       {request{path: "/api/helloworld", body: `[]`, header: asJSON()}, 400, "shop.v1.Order"},
		"wrong type":          {request{path: "/api/helloworld", body: `{"count":"many"}`, header: asJSON()}, 400, "count"},
		"wrong type in query": {request{path: "/api/helloworld?count=many", method: "GET"}, 400, `field "count": "many" is no int32`},
		"wrong type deep":     {request{path: "/api/helloworld?item.price=x", method: "GET"}, 400, `field "item.price"`},
		"overflow":            {request{path: "/api/helloworld?count=3000000000", method: "GET"}, 400, `"count"`},
		"bad enum in query":   {request{path: "/api/helloworld?color=PINK", method: "GET"}, 400, `"color"`},
		"two of a oneof":      {request{path: "/api/helloworld", body: `{"left":"a","right":1}`, header: asJSON()}, 400, "oneof"},
		"bad query":           {request{path: "/api/helloworld?a=%zz", method: "GET"}, 400, "malformed"},
		"too nested":          {request{path: "/api/helloworld?item" + strings.Repeat(".inner", 40) + "=1", method: "GET"}, 400, "nested"},
		"JSON bomb":           {request{path: "/api/helloworld", body: strings.Repeat(`{"item":`, 1) + strings.Repeat(`{"inner":`, 10_000) + "{}" + strings.Repeat("}", 10_001), header: asJSON()}, 400, "depth"},
		"multipart":           {request{path: "/api/helloworld", body: "x", header: http.Header{"Content-Type": {"multipart/form-data; boundary=x"}}}, 400, "multipart form is malformed"},
		"no boundary":         {request{path: "/api/helloworld", body: "x", header: http.Header{"Content-Type": {"multipart/form-data"}}}, 400, "no boundary"},
		"xml":                 {request{path: "/api/helloworld", body: "<a/>", header: http.Header{"Content-Type": {"text/xml"}}}, 415, "text/xml"},
		"brotli":              {request{path: "/api/helloworld", body: "x", header: asJSON("Content-Encoding", "br")}, 415, "br"},
		"not gzip":            {request{path: "/api/helloworld", body: "x", header: asJSON("Content-Encoding", "gzip")}, 400, "gzip"},
		"too large":           {request{path: "/api/helloworld", body: big, header: asJSON()}, 413, "larger than 1048576"},
		"zip bomb":            {request{path: "/api/helloworld", body: zip.String(), header: asJSON("Content-Encoding", "gzip")}, 413, "larger"},
		"client stream":       {request{path: "/api/helloworld/chat", body: "{}", header: asJSON()}, 501, "WebSocket"},
		"bad -bin":            {request{path: "/api/helloworld", body: "{}", header: asJSON("X-Bin", "!!")}, 400, "base64"},
		"deadline":            {request{path: "/api/helloworld/slow", body: "{}", header: asJSON("Grpc-Timeout", "30m")}, 504, "deadline"},
		"app: not found":      {request{path: "/api/helloworld/fail", body: `{"count":5,"name":"nö % such"}`, header: asJSON()}, 404, "nö % such"},
		"app: no text":        {request{path: "/api/helloworld/fail", body: `{"count":7}`, header: asJSON()}, 403, "PermissionDenied"},
		"app: odd code":       {request{path: "/api/helloworld/fail", body: `{"count":99}`, header: asJSON()}, 500, "99"},
		"stream fails first":  {request{path: "/api/helloworld/stream", body: `{"name":"none"}`, header: asJSON()}, 404, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			res, body := tc.do(t, base)
			var e struct {
				ID, Detail, Status string
				Code               int
			}
			if err := json.Unmarshal([]byte(body), &e); err != nil {
				t.Fatalf("%s %q: %v", res.Status, body, err)
			}
			if res.StatusCode != tc.code || e.Code != tc.code || !strings.Contains(e.Detail, tc.detail) || e.ID != "helloworld" || e.Status != http.StatusText(tc.code) {
				t.Errorf("%s %s, want %d with %q", res.Status, body, tc.code, tc.detail)
			}
		})
	}
}

func TestMetadata(t *testing.T) {
	base := front(t, Config{})
	res, _ := request{path: "/api/helloworld", header: asJSON("Authorization", "Bearer t", "Grpc-Metadata-X-Custom", "c", "Grpc-Encoding", "lzma", "Connection", "close")}.do(t, base)
	for k, want := range map[string]string{"Saw-Authorization": "Bearer t", "Saw-X-Custom": "c", "Saw-Grpc-Encoding": "", "Trailer-Cost": "7", "Grpc-Status": ""} {
		if got := res.Header.Get(k); got != want {
			t.Errorf("%s: %q, want %q", k, got, want)
		}
	}
}

func TestServerStream(t *testing.T) {
	base := front(t, Config{})
	for _, tc := range []struct{ body, accept, ct, want string }{
		{`{"count":2}`, "", "application/x-ndjson", "{\"result\":{\"count\":2}}\n{\"result\":{\"count\":2}}\n"},
		{`{"count":0}`, "", "application/x-ndjson", ""},
		{`{"name":"gone","count":1}`, "", "application/x-ndjson", "{\"result\":{\"name\":\"gone\",\"count\":1}}\n{\"error\":{\"id\":\"m3o\",\"code\":404,\"detail\":\"gone\",\"status\":\"Not Found\"}}\n"},
		{`{"name":"gone","count":1}`, "text/event-stream", "text/event-stream", "data: {\"name\":\"gone\",\"count\":1}\n\nevent: error\ndata: {\"id\":\"m3o\",\"code\":404,\"detail\":\"gone\",\"status\":\"Not Found\"}\n\n"},
	} {
		res, body := request{path: "/api/helloworld/stream", body: tc.body, header: asJSON("Accept", tc.accept)}.do(t, base)
		if got := strings.ReplaceAll(body, ", ", ","); res.StatusCode != 200 || res.Header.Get("Content-Type") != tc.ct || strings.ReplaceAll(got, `": `, `":`) != tc.want {
			t.Errorf("%s %s: %s %s %q, want %q", tc.body, tc.accept, res.Status, res.Header.Get("Content-Type"), body, tc.want)
		}
	}
}

// A server that lies: every answer is told as the app's fault, never hangs.
func TestAppThatBreaksTheProtocol(t *testing.T) {
	_, fds := app(t, false)
	g, file := New(Config{MaxMessage: 1000}), writeSet(t, fds)
	for name, tc := range map[string]struct {
		code   int
		detail string
		answer http.HandlerFunc
	}{
		"no gRPC":       {502, "HTTP 500", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }},
		"unavailable":   {503, "HTTP 503", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }},
		"HTML":          {502, "text/html", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Type", "text/html") }},
		"no status":     {502, "without a status", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x00\x00\x00\x00\x00", "") }},
		"bad status":    {502, "the status", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x00\x00\x00\x00\x00", "x") }},
		"no message":    {502, "without an answer", func(w http.ResponseWriter, _ *http.Request) { gr(w, "", "0") }},
		"two messages":  {502, "two answers", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "0") }},
		"compressed":    {502, "compressed", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x01\x00\x00\x00\x00", "0") }},
		"too large":     {502, "larger than 1000", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x00\xff\xff\xff\xff", "0") }},
		"cut off":       {502, "broke off", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x00\x00\x00\x00\x09abc", "0") }},
		"half a prefix": {502, "broke off", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x00\x00", "0") }},
		"garbage":       {502, "makes no sense", func(w http.ResponseWriter, _ *http.Request) { gr(w, "\x00\x00\x00\x00\x02\xff\xff", "0") }},
		"reset":         {503, "cannot be reached", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewUnstartedServer(tc.answer)
			srv.Config.Protocols = new(http.Protocols)
			srv.Config.Protocols.SetUnencryptedHTTP2(true)
			srv.Start()
			defer srv.Close()
			w := httptest.NewRecorder()
			r := httptest.NewRequestWithContext(t.Context(), "POST", "/shop.v1.Helloworld/Call", strings.NewReader("{}"))
			r.Header.Set("Content-Type", "application/json")
			g.ServeApp(w, r, &m3o.API{App: "helloworld", Schema: file}, h2c(t, srv.Listener.Addr().String()))
			if w.Code != tc.code || !strings.Contains(w.Body.String(), tc.detail) {
				t.Errorf("%d %s, want %d with %q", w.Code, w.Body, tc.code, tc.detail)
			}
		})
	}
}

func gr(w http.ResponseWriter, body, status string) {
	w.Header().Set("Content-Type", "application/grpc")
	_, _ = io.WriteString(w, body)
	if status != "" {
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
	}
}

func TestWithoutASchema(t *testing.T) {
	g := New(Config{})
	corrupt := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(corrupt, []byte("\xff\xff"), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, code := range map[string]int{"": 501, corrupt: 503, "/nowhere": 503} {
		w := httptest.NewRecorder()
		g.ServePath(w, httptest.NewRequest("GET", "/", nil), &m3o.API{App: "foo", Schema: file}, "bar", nil)
		if w.Code != code {
			t.Errorf("schema %q: %d %s, want %d", file, w.Code, w.Body, code)
		}
	}
}

func TestReflect(t *testing.T) {
	addr, want := app(t, true)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	fds, err := Reflect(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, f := range fds.File {
		have[f.GetName()] = true
	}
	for _, f := range want.File {
		if !have[f.GetName()] {
			t.Errorf("%s is missing", f.GetName())
		}
	}
	s, err := compile(fds, false)
	if err != nil || s.methods["/shop.v1.Helloworld/Call"] == nil || len(s.list) != 7 {
		t.Errorf("%v, %d methods", err, len(s.list))
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	if _, err := Reflect(ctx, ln.Addr().String()); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("a server without reflection: %v", err)
	}
}

func TestReflectV1Alpha(t *testing.T) {
	fds, files := compileShop(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	reflection.Register(alphaOnly{reflectable{srv, files}})
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	got, err := Reflect(t.Context(), ln.Addr().String())
	if err != nil || len(got.File) < len(fds.File) {
		t.Errorf("%v, %v", got, err)
	}
}

type alphaOnly struct{ reflectable }

func (a alphaOnly) RegisterService(d *grpc.ServiceDesc, impl any) {
	if strings.Contains(d.ServiceName, "v1alpha") {
		a.reflectable.RegisterService(d, impl)
	}
}

func FuzzResolve(f *testing.F) {
	fds, _ := compileShop(f)
	s, err := compile(fds, false)
	if err != nil {
		f.Fatal(err)
	}
	for _, p := range []string{"", "call", "foo/bar", "v1/bar-baz/do_this", "/shop.v1.Helloworld/Call", "//", strings.Repeat("a/", 100), "\xff"} {
		f.Add("helloworld", p)
	}
	f.Fuzz(func(t *testing.T, app, path string) {
		m, err := s.resolve(app, path)
		if (m == nil) == (err == nil) {
			t.Errorf("%q %q: %v, %v", app, path, m, err)
		}
		if p, ok := errors.AsType[*problem](err); err != nil && (!ok || p.http != 404) {
			t.Errorf("%q %q: %v", app, path, err)
		}
	})
}

func FuzzForm(f *testing.F) {
	fds, _ := compileShop(f)
	s, err := compile(fds, false)
	if err != nil {
		f.Fatal(err)
	}
	m := s.methods["/shop.v1.Helloworld/Call"]
	for _, q := range []string{"name=x&count=1", "item[inner][name]=x", "by_id[1]={}", "counts[]=1", "a[[=1", "item=1", "any=1", "free={}", "at=now", "maybe_zero=0",
		"left=a&right=1", "numbers=1&numbers=x", "yesno[true]=x", "mask=a,b", "raw=_-", "items={}", url.QueryEscape("@odd") + "=1"} {
		f.Add(q)
	}
	f.Fuzz(func(t *testing.T, q string) {
		msg := dynamicpb.NewMessage(m.desc.Input())
		if err := fill(msg, q, m.types, false); err != nil {
			if p, ok := errors.AsType[*problem](err); !ok || p.http != 400 {
				t.Errorf("%q: %v", q, err)
			}
			return
		}
		if _, err := proto.Marshal(msg); err != nil {
			t.Errorf("%q makes a message that cannot be sent: %v", q, err)
		}
	})
}

func FuzzDecodeMessage(f *testing.F) {
	for _, s := range []string{"", "plain", "%20", "%", "%2", "%zz", "%E2%82%AC", "\xff", "%FF"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got := decodeMessage(s); !json.Valid([]byte((&problem{detail: got}).json("x"))) || strings.ToValidUTF8(got, "") != got {
			t.Errorf("%q became %q", s, got)
		}
	})
}
