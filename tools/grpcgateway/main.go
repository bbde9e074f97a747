// Command grpcgateway is what the benchmark of JSON → gRPC holds the gateway
// against: a compiled grpc-gateway, and the gRPC server that is behind both.
// It is a module of its own so that nothing of it reaches the product.
//
// bench.pb.go, bench_grpc.pb.go and bench.pb.gw.go are made from bench.proto by
// go generate.
package main

//go:generate sh generate.sh

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

func main() {
	serve := flag.String("serve", "", "be the gRPC server at this address")
	gate := flag.String("gateway", "", "be the gateway at this address")
	to := flag.String("to", "", "the gRPC server of the gateway")
	schema := flag.String("schema", "", "write the FileDescriptorSet to this file and end")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := errors.New("one of -serve, -gateway and -schema is needed")
	switch {
	case *schema != "":
		err = writeSchema(*schema)
	case *serve != "":
		err = server(ctx, *serve)
	case *gate != "":
		err = gateway(ctx, *gate, *to)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "grpcgateway:", err)
		os.Exit(1)
	}
}

type shop struct{ UnimplementedShopServer }

func (shop) Hello(_ context.Context, in *HelloRequest) (*HelloReply, error) {
	return &HelloReply{Message: "Hello " + in.Name}, nil
}

func (shop) Place(_ context.Context, in *Order) (*Order, error) { return in, nil }

func server(ctx context.Context, addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	srv := grpc.NewServer()
	RegisterShopServer(srv, shop{})
	defer context.AfterFunc(ctx, srv.Stop)()
	return srv.Serve(ln)
}

func gateway(ctx context.Context, addr, to string) error {
	mux := runtime.NewServeMux()
	if err := RegisterShopHandlerFromEndpoint(ctx, mux, to, []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}); err != nil {
		return err
	}
	srv := &http.Server{Addr: addr, Handler: mux, ReadHeaderTimeout: time.Minute}
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// writeSchema writes bench.proto and all it imports, what is imported first.
func writeSchema(file string) error {
	set, seen := &descriptorpb.FileDescriptorSet{}, map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(fd protoreflect.FileDescriptor) {
		if seen[fd.Path()] {
			return
		}
		seen[fd.Path()] = true
		for i := range fd.Imports().Len() {
			add(fd.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(fd))
	}
	add(File_bench_proto)
	b, err := proto.Marshal(set)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o644)
}
