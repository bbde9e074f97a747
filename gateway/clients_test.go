package gateway

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/m3o/m3o/internal/need"
)

func get(t *testing.T, url string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
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
	return res, b
}

func write(t *testing.T, file string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func tool(t *testing.T, dir string, argv ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

// The generated Go client is fetched as Go fetches modules, compiled and run
// against the app it is for.
func TestGoClient(t *testing.T) {
	need.Program(t, "go")
	base := front(t, Config{})
	dir := t.TempDir()
	write(t, filepath.Join(dir, "go.mod"), []byte("module try\n\ngo 1.26\n"))
	write(t, filepath.Join(dir, "main.go"), []byte(`package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"time"

	"shop.test/client"
)

func main() {
	c := (&client.Client{URL: os.Args[1]}).Helloworld()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	at, took, zero := time.Unix(1, 0).UTC(), client.Duration(-1500*time.Millisecond), int32(0)
	in := &client.Order{Name: "Ada", Big: 1 << 60, Ubig: 1 << 63, Ok: true, Raw: []byte{0xff}, Color: client.Color_GREEN, Numbers: []int32{1}, Item: &client.Item{Price: 1.5},
		Items: []*client.Item{{Name: "x"}}, Counts: map[string]client.Int64{"k": 7}, ById: map[int32]*client.Item{1: {}}, At: &at, Took: &took, MaybeZero: &zero, Yesno: map[string]string{"true": "y"}, OddName: "odd"}
	out, err := c.Call(ctx, in)
	if err != nil {
		panic(err)
	}
	fmt.Println(out.Name, out.Big, out.Ubig, out.Ok, out.Raw, out.Color, out.Numbers, out.Item.Price, out.Items[0].Name, out.Counts["k"], len(out.ById), out.At, time.Duration(*out.Took), *out.MaybeZero, out.Yesno["true"], out.OddName)
	n := 0
	for m, err := range c.Stream(ctx, &client.Order{Name: "gone", Count: 3}) {
		if err != nil {
			var e *client.Error
			fmt.Println(n, errors.As(err, &e), e)
			break
		}
		n += int(m.Count)
	}
	for m, err := range c.Chat(ctx, iter.Seq[*client.Order](func(yield func(*client.Order) bool) { yield(&client.Order{Name: "both"}) })) {
		fmt.Println(m.GetName(), err)
	}
}
`))
	main, err := os.ReadFile(filepath.Join(dir, "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "main.go"), []byte(strings.ReplaceAll(string(main), "m.GetName()", "m.Name")))
	cmd := exec.CommandContext(t.Context(), "go", "get", "shop.test/client@latest")
	cmd.Dir = dir
	// A module's path is of the app's host; here the gateway stands for it.
	cmd.Env = append(os.Environ(), "GOPROXY="+base+"/host/shop.test/-/go", "GONOSUMDB=*", "GONOSUMCHECK=1", "GOFLAGS=-mod=mod", "GOMODCACHE="+filepath.Join(dir, "cache"), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go get: %v\n%s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("chmod", "-R", "u+w", filepath.Join(dir, "cache")).Run() }) // else TempDir cannot be removed
	run := exec.CommandContext(t.Context(), "go", "run", ".", base+"/app")
	run.Dir, run.Env = dir, cmd.Env
	out, err := run.CombinedOutput()
	want := "Ada 1152921504606846976 9223372036854775808 true [255] GREEN [1] 1.5 x 7 1 1970-01-01 00:00:01 +0000 UTC -1.5s 0 y odd\n9 true not_found: gone\nboth <nil>\n"
	if err != nil || string(out) != want {
		t.Errorf("%v\n got %s\nwant %s", err, out, want)
	}
}

// The generated TypeScript client, as a file and as a package, is checked by
// tsc at its strictest and run by Node.js against the app it is for.
func TestTypeScriptClient(t *testing.T) {
	node := need.Program(t, "node")
	tsc, err := filepath.Abs("../testdata/clients/node_modules/typescript/bin/tsc")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(tsc); errors.Is(err, os.ErrNotExist) {
		need.Program(t, "testdata/clients (make deps)")
	}
	base := front(t, Config{})
	dir := t.TempDir()
	_, src := get(t, base+"/app/-/client.ts")
	write(t, filepath.Join(dir, "client.ts"), src)
	_, tgz := get(t, base+"/app/-/client.tgz")
	write(t, filepath.Join(dir, "client.tgz"), tgz)
	write(t, filepath.Join(dir, "package.json"), []byte(`{"private":true,"type":"module"}`))
	tool(t, dir, "npm", "install", "--offline", "--no-audit", "--no-fund", "./client.tgz")
	main := `import { Helloworld, CallError, type Order } from "FROM";
const c = new Helloworld({ baseUrl: process.argv[2], token: () => "t" });
const order: Order = { name: "Ada", big: "1152921504606846976", color: "GREEN", numbers: [1], item: { price: 1.5 }, counts: { k: "7" }, at: "1970-01-01T00:00:01Z", "@odd": "odd" };
const got: Order = await c.call(order, { timeoutMs: 60000 });
console.log(JSON.stringify([got.name, got.big, got.color, got.item?.price, got.counts, got.at, got["@odd"]]));
let n = 0;
try {
  for await (const m of c.stream({ name: "gone", count: 3 })) n += m.count ?? 0;
} catch (err) {
  console.log(n, err instanceof CallError, String(err), (err as CallError).code);
}
for await (const m of c.chat([{ name: "both" }])) console.log(m.name);
try {
  await c.slow({}, { timeoutMs: 50 });
} catch (err) {
  console.log((err as CallError).code);
}
`
	write(t, filepath.Join(dir, "file.ts"), []byte(strings.ReplaceAll(main, "FROM", "./client.js")))
	write(t, filepath.Join(dir, "pack.ts"), []byte(strings.ReplaceAll(main, "FROM", "helloworld-client")))
	write(t, filepath.Join(dir, "env.d.ts"), []byte("declare const process: { argv: string[] };\n"))
	write(t, filepath.Join(dir, "tsconfig.json"), []byte(`{"compilerOptions":{"strict":true,"noUnusedLocals":true,"noImplicitReturns":true,"target":"ES2022","module":"nodenext","moduleResolution":"nodenext","lib":["ES2022","DOM","DOM.AsyncIterable","DOM.Iterable"],"outDir":"out"}}`))
	tool(t, dir, node, tsc, "-p", ".")
	want := `["Ada","1152921504606846976","GREEN",1.5,{"k":"7"},"1970-01-01T00:00:01Z","odd"]
9 true CallError: gone not_found
both
deadline_exceeded
`
	for _, f := range []string{"file", "pack"} {
		if out := tool(t, dir, node, "out/"+f+".js", base+"/app"); out != want {
			t.Errorf("%s:\n got %s\nwant %s", f, out, want)
		}
	}
}

func TestOwnPages(t *testing.T) {
	base := front(t, Config{})
	res, b := get(t, base+"/app/-/openapi.json")
	var doc struct {
		OpenAPI    string
		Paths      map[string]map[string]any
		Components struct {
			Schemas map[string]any
		}
	}
	if err := json.Unmarshal(b, &doc); err != nil || doc.OpenAPI != "3.1.0" || doc.Paths["/shop.v1.Helloworld/Call"]["post"] == nil || doc.Components.Schemas["shop.v1.Order"] == nil {
		t.Errorf("openapi.json: %s %v %s", res.Status, err, b)
	}
	if res, b := get(t, base+"/app/-/docs"); res.StatusCode != 200 || !strings.Contains(string(b), "/shop.v1.Helloworld/Call") || !strings.Contains(res.Header.Get("Content-Security-Policy"), "default-src 'none'") {
		t.Errorf("docs: %s %s", res.Status, b)
	}
	res, b = get(t, base+"/app/-/client.tgz")
	z, err := gzip.NewReader(strings.NewReader(string(b)))
	if err != nil {
		t.Fatal(res.Status, err)
	}
	names := ""
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if err != nil {
			break
		}
		names += h.Name + " "
	}
	if names != "package/package.json package/client.js package/client.d.ts " {
		t.Errorf("client.tgz holds %s", names)
	}
	_, fds := app(t, false)
	want, _ := proto.Marshal(fds)
	if res, b := get(t, base+"/app/-/descriptor.binpb"); res.StatusCode != 200 || len(b) != len(want) {
		t.Errorf("descriptor.binpb: %s, %d bytes", res.Status, len(b))
	}
	if res, _ := get(t, base+"/app/-/nothing"); res.StatusCode != 404 {
		t.Errorf("/-/nothing: %s", res.Status)
	}
	req, _ := http.NewRequestWithContext(t.Context(), "POST", base+"/app/-/docs", nil)
	if res, err := http.DefaultClient.Do(req); err != nil || res.StatusCode != 405 {
		t.Errorf("POST /-/docs: %v %v", res, err)
	}
}
