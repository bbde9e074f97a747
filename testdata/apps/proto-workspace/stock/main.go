// Stock is a gRPC service of a workspace. Its own .proto lies in its module,
// and what it imports in the module contracts beside it. There is no generated
// code, and contracts requires nothing: in a workspace stock does for both.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	ratesv1 "example.com/proto-workspace/contracts/gen/rates/v1"
	moneyv1 "example.com/proto-workspace/contracts/money/v1"
	stockv1 "example.com/proto-workspace/stock/gen/stock/v1"
)

func main() {
	ln, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s := grpc.NewServer()
	stockv1.RegisterStockServer(s, stock{})
	ratesv1.RegisterRatesServer(s, rates{})
	healthpb.RegisterHealthServer(s, health.NewServer())
	context.AfterFunc(ctx, s.GracefulStop)
	if err := s.Serve(ln); err != nil {
		log.Fatal(err)
	}
}

type rates struct {
	ratesv1.UnimplementedRatesServer
}

// Get says that everything costs a cent for each letter of its name.
func (rates) Get(_ context.Context, r *ratesv1.GetRequest) (*ratesv1.GetResponse, error) {
	return &ratesv1.GetResponse{Item: r.GetItem(), Price: &moneyv1.Money{Cents: int64(len(r.GetItem()))}}, nil
}

type stock struct {
	stockv1.UnimplementedStockServer
}

func (stock) Worth(ctx context.Context, r *stockv1.WorthRequest) (*stockv1.WorthResponse, error) {
	p, err := rates{}.Get(ctx, &ratesv1.GetRequest{Item: r.GetItem()})
	if err != nil {
		return nil, err
	}
	return &stockv1.WorthResponse{Worth: &moneyv1.Money{Cents: p.GetPrice().GetCents() * r.GetCount()}}, nil
}
