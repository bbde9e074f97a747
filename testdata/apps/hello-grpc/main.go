// Hello-grpc is a greeter: two unary methods and one server stream, with
// health and reflection, on the port that PORT names.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	helloworld "example.com/hello-grpc/proto"
)

// greeting opens every answer: change it to tell one release from the next.
const greeting = "Hello"

const (
	interval = 100 * time.Millisecond // between two messages of Watch
	maxCount = 100_000
)

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative proto/helloworld.proto

func main() {
	if err := serve(); err != nil {
		log.Fatal(err)
	}
}

func serve() error {
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	ln, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()

	s := grpc.NewServer()
	helloworld.RegisterHelloworldServer(s, caller{})
	helloworld.RegisterGreeterServer(s, greeter{})
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	reflection.Register(s)

	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		log.Print("stopping: no new calls, open ones finish")
		h.Shutdown()
		s.GracefulStop()
	}()
	log.Printf("%s serves on %s", greeting, ln.Addr())
	if err := s.Serve(ln); err != nil {
		return err
	}
	<-stopped
	log.Print("stopped")
	return nil
}

func greet(name string) string {
	if name == "" {
		return greeting
	}
	return greeting + " " + name
}

type caller struct {
	helloworld.UnimplementedHelloworldServer
}

func (caller) Call(_ context.Context, r *helloworld.Request) (*helloworld.Response, error) {
	log.Printf("Helloworld.Call %q", r.GetName())
	return &helloworld.Response{Msg: greet(r.GetName())}, nil
}

type greeter struct {
	helloworld.UnimplementedGreeterServer
}

func (greeter) Hello(_ context.Context, r *helloworld.Request) (*helloworld.Response, error) {
	log.Printf("Greeter.Hello %q", r.GetName())
	return &helloworld.Response{Msg: greet(r.GetName())}, nil
}

func (greeter) Watch(r *helloworld.WatchRequest, stream grpc.ServerStreamingServer[helloworld.WatchResponse]) error {
	if r.GetCount() < 1 || r.GetCount() > maxCount {
		return status.Error(codes.InvalidArgument, fmt.Sprintf("count must be 1 to %d", maxCount))
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for n := int32(1); ; n++ {
		if err := stream.Send(&helloworld.WatchResponse{Msg: greet(r.GetName()), Number: n}); err != nil {
			return err
		}
		if n == r.GetCount() {
			return nil
		}
		select {
		case <-tick.C:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}
