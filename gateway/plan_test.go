package gateway

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

func codecs(t testing.TB) (*plan, *generic) {
	t.Helper()
	fds, _ := compileShop(t)
	s, err := compile(fds, false)
	if err != nil {
		t.Fatal(err)
	}
	p := s.methods["/shop.v1.Helloworld/Call"].in.(fast).plan
	return p, p.generic
}

var someJSON = []string{
	`{}`, `{"name":"Ada","count":3,"big":"9007199254740993","ubig":18446744073709551615,"ok":true,"raw":"_-8","color":"GREEN"}`,
	`{"numbers":[1,-2,3],"words":["a","b\n\u00e9\""],"item":{"name":"n","price":1.5e3,"tags":[]},"items":[{},{"inner":{"name":"x"}}]}`,
	`{"counts":{"a":"1","b":-2},"left":"l","ratio":0.1,"exact":1e100,"at":"2020-01-02T03:04:05.5Z","took":"-1.5s","maybe":"","mask":"a,bC"}`,
	`{"maybeZero":0,"maybe_zero":0,"zig":-1,"zag":"-2","f32":1,"f64":"2","s32":-3,"s64":"-4","u32":4294967295,"colors":["RED",1,-2,99]}`,
	`{"paint":{"x":"GREEN"},"free":{"a":[1,null,{"b":2}]},"flags":[true,false],"points":[1,2.5],"blobs":["AA==","AA"],"yesno":{"true":"t"},"@odd":"o","odd_name":"p"}`,
	`{"count":1.0}`, `{"count":1e2}`, `{"count":01}`, `{"count":+1}`, `{"count":2147483648}`, `{"count":"-0"}`, `{"name":null,"left":null,"right":1}`, `{"left":"a","right":1}`,
	`{"color":null,"colors":[null]}`, `{"item":null,"items":[null]}`, `{"counts":{"a":1,"a":2}}`, `{"counts":{"a":null}}`, `{"unknown":1}`, `{"name":"\ud83d\ude00"}`, `{"name":"\ud83d"}`,
	`{"name":"a"}x`, `{"name":"a",}`, `{"name" : "a" , "ok" : false }`, `{"ratio":"NaN"}`, `{"exact":-0}`, `{"ratio":1e39}`, `{"exact":.5}`, `{"exact":"0x1p2"}`, `[]`, `null`, ``, `{"ok":"true"}`,
	`{"byId":{"1":{}}}`, `{"any":{"@type":"type.googleapis.com/shop.v1.Item","name":"x"}}`, `{"raw":"A"}`, `{"raw":"AA=A"}`, `{"sub":{"price":"1.5"}}`, "{\"name\":\"\xff\"}", "{\"na\x00me\":1}",
}

// bothWays turns text by the table and by the generic codec: where the table
// gives an answer, it is the same.
func bothWays(t *testing.T, p *plan, g *generic, text []byte) {
	t.Helper()
	d := reader{b: text}
	wire, err := p.object(&d, nil, 0)
	if err != nil || !d.end() {
		return // the generic codec's
	}
	if _, err := (&generic{desc: g.desc, types: g.types, strict: true}).toWire(nil, text); p.generic.strict && err != nil {
		t.Errorf("%q is refused where unknown fields are: %v", text, err)
	}
	want, err := g.toWire(nil, text)
	if err != nil {
		t.Errorf("%q is refused: %v", text, err)
		return
	}
	a, b := dynamicpb.NewMessage(g.desc), dynamicpb.NewMessage(g.desc)
	if err := proto.Unmarshal(wire, a); err != nil {
		t.Errorf("%q became %x: %v", text, wire, err)
		return
	}
	if err := proto.Unmarshal(want, b); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(a, b) {
		t.Errorf("%q became %v, want %v", text, a, b)
	}
	back(t, p, g, wire)
	back(t, p, g, want)
}

func back(t *testing.T, p *plan, g *generic, wire []byte) {
	t.Helper()
	got, err := p.print(nil, wire, 0)
	if err != nil {
		return // the generic codec's
	}
	want, err := g.toJSON(nil, wire)
	if err != nil {
		t.Errorf("%x became %s, want an error: %v", wire, got, err)
		return
	}
	var x, y any
	if err := json.Unmarshal(got, &x); err != nil {
		t.Errorf("%x became %s: %v", wire, got, err)
	}
	if err := json.Unmarshal(want, &y); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(x, y) {
		t.Errorf("%x became\n%s, want\n%s", wire, got, want)
	}
}

func FuzzJSONToWire(f *testing.F) {
	p, g := codecs(f)
	strict := (&planner{types: g.types, strict: true, plans: map[protoreflect.FullName]*plan{}}).plan(g.desc)
	for _, s := range someJSON {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		bothWays(t, p, g, b)
		bothWays(t, strict, g, b)
	})
}

func FuzzWireToJSON(f *testing.F) {
	p, g := codecs(f)
	for _, s := range someJSON {
		if wire, err := g.toWire(nil, []byte(s)); err == nil {
			f.Add(wire)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) { back(t, p, g, b) })
}

// The table answers what is common: else it is of no use.
func TestTheTableIsUsed(t *testing.T) {
	p, _ := codecs(t)
	for _, s := range someJSON[:2] {
		d := reader{b: []byte(s)}
		wire, err := p.object(&d, nil, 0)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		if _, err := p.print(nil, wire, 0); err != nil {
			t.Errorf("%x: %v", wire, err)
		}
	}
}

func BenchmarkCodec(b *testing.B) {
	p, g := codecs(b)
	for name, text := range map[string]string{
		"small": `{"name":"Ada","count":3}`,
		"1KB":   `{"name":"order","count":7,"items":[` + strings.TrimSuffix(strings.Repeat(`{"name":"a thing to buy","price":12.5,"tags":["red","blue"]},`, 14), ",") + `],"counts":{"a":"1","b":"2"}}`,
	} {
		wire, err := g.toWire(nil, []byte(text))
		if err != nil {
			b.Fatal(err)
		}
		for codec, c := range map[string]interface {
			toWire(dst, json []byte) ([]byte, error)
			toJSON(dst, wire []byte) ([]byte, error)
		}{"table": fast{p}, "generic": g} {
			b.Run(name+"/toWire/"+codec, func(b *testing.B) {
				buf := make([]byte, 0, 4096)
				b.ReportAllocs()
				for b.Loop() {
					if _, err := c.toWire(buf, []byte(text)); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run(name+"/toJSON/"+codec, func(b *testing.B) {
				buf := make([]byte, 0, 4096)
				b.ReportAllocs()
				for b.Loop() {
					if _, err := c.toJSON(buf, wire); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
