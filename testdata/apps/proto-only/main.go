// Proto-only keeps notes in memory. The repository has .proto files and
// handlers, and neither generated code nor gRPC reflection: the platform makes
// the one and needs no other.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	notesv1 "example.com/proto-only/gen/notes/v1"
)

// prefix opens every text: change it to tell one release from the next.
const prefix = ""

func main() {
	ln, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s := grpc.NewServer()
	notesv1.RegisterNotesServer(s, &notes{})
	healthpb.RegisterHealthServer(s, health.NewServer())
	context.AfterFunc(ctx, s.GracefulStop)
	if err := s.Serve(ln); err != nil {
		log.Fatal(err)
	}
}

type notes struct {
	notesv1.UnimplementedNotesServer
	mu  sync.Mutex // guards all
	all []*notesv1.Note
}

func (n *notes) Add(_ context.Context, r *notesv1.AddRequest) (*notesv1.AddResponse, error) {
	if r.GetText() == "" {
		return nil, status.Error(codes.InvalidArgument, "text is empty")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all = append(n.all, &notesv1.Note{Text: prefix + r.GetText(), Added: timestamppb.Now()})
	return &notesv1.AddResponse{Text: prefix + r.GetText(), Count: int32(len(n.all))}, nil
}

func (n *notes) List(context.Context, *notesv1.ListRequest) (*notesv1.ListResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return &notesv1.ListResponse{Notes: n.all[:len(n.all):len(n.all)]}, nil
}
