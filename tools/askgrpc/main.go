// Command askgrpc makes one native gRPC call to the sample service through the
// router, with nothing but grpc-go and the internal CA: what any client does.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protowire"
)

// raw passes messages as bytes: the sample's request and answer have one
// string field each, so no generated code is needed.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (raw) Unmarshal(b []byte, v any) error { *v.(*[]byte) = append([]byte(nil), b...); return nil }

func main() {
	ca := flag.String("ca", "", "certificate of the internal CA")
	addr := flag.String("addr", "127.0.0.1:8443", "address of the router")
	host := flag.String("host", "", "host name of the app")
	method := flag.String("method", "", "full method name")
	name := flag.String("name", "", "value of the request's field 1")
	flag.Parse()
	if err := ask(*ca, *addr, *host, *method, *name); err != nil {
		fmt.Fprintln(os.Stderr, "askgrpc:", err)
		os.Exit(1)
	}
}

func ask(ca, addr, host, method, name string) error {
	pem, err := os.ReadFile(ca)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: host})), grpc.WithAuthority(host))
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // the answer has been read
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), name)
	var res []byte
	if err := conn.Invoke(ctx, method, &req, &res); err != nil {
		return err
	}
	for len(res) > 0 {
		num, typ, n := protowire.ConsumeTag(res)
		if n < 0 {
			return protowire.ParseError(n)
		}
		res = res[n:]
		if typ == protowire.BytesType {
			s, n := protowire.ConsumeString(res)
			if n < 0 {
				return protowire.ParseError(n)
			}
			fmt.Println(s)
			res = res[n:]
			continue
		}
		n = protowire.ConsumeFieldValue(num, typ, res)
		if n < 0 {
			return protowire.ParseError(n)
		}
		res = res[n:]
	}
	return nil
}
